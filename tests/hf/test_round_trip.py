"""Every family: the logits and the greedy text of transformers, on one device and on eight, and
nothing lost on the way in and out again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hf_folders import FAMILIES, read_weights, reference

import lm
from lm import exchange, generate
from lm.parallel.mesh import Mesh

# float32 against float32: sums in another order differ by 1e-5 here; a wrong window, cap or
# scaling by more than 0.1.
TOLERANCE = 2e-4


def off(run, wanted) -> float:
    """The largest difference from the reference logits."""
    logits_btv = np.asarray(run.logits(wanted["tokens"]))[:, wanted["positions"]]
    return np.abs(logits_btv - wanted["logits"]).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, opened):
    assert off(opened(family), reference(family)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_with_the_cache_is_that_of_transformers(family, opened):
    run, wanted = opened(family), reference(family)
    prompt, text = wanted["greedy_prompt"][0].tolist(), wanted["greedy"][0].tolist()
    (found,) = generate.generate(
        run.experiment.model,
        run.experiment.precision.to_compute(run.params),
        [prompt],
        context=64,
        max_tokens=len(text) - len(prompt),
        sampling=generate.Sampling(temperature=0),
    )
    assert prompt + found.tokens == text


@pytest.mark.parametrize("family", FAMILIES)
def test_import_and_export_give_back_the_same(family, folder, tmp_path):
    """Through a run folder, into small files: weights bit for bit, the same model, the same family
    and ids."""
    imported = exchange.import_run(folder(family), tmp_path / "run")
    out = exchange.export_run(tmp_path / "run", tmp_path / "out", shard_bytes=200_000)
    before, after = read_weights(folder(family)), read_weights(out)
    assert before.keys() == after.keys()
    assert all(x.dtype == after[name].dtype for name, x in before.items())
    assert all(x.tobytes() == after[name].tobytes() for name, x in before.items())
    assert len(list(out.glob("*.safetensors"))) > 1
    again = lm.load(out)
    assert again.experiment.model == imported.experiment.model
    given, written = (json.loads((f / "config.json").read_text()) for f in (folder(family), out))
    for field in given.keys() & written.keys():
        assert given[field] == written[field], field
    assert off(lm.load(tmp_path / "run"), reference(family)) < TOLERANCE


def test_bfloat16_is_kept_as_stored(opened):
    formats = {x.dtype.name for x in jax.tree.leaves(opened("llama3").params)}
    assert formats == {"bfloat16"}


@pytest.mark.slow
def test_eight_devices_compute_the_same(folder):
    """In one process for all families; the weights are born on the mesh."""
    folders = [str(folder(family)) for family in FAMILIES]
    here = Path(__file__)
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(here.parents[2]), str(here.parent)])
        + os.pathsep
        + os.environ.get("PYTHONPATH", ""),
    }
    command = [sys.executable, str(here), *folders]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert said.returncode == 0, said.stderr[-3000:]
    found = json.loads(said.stdout.splitlines()[-1])
    assert found.keys() == set(FAMILIES)
    assert all(each["devices"] == 8 for each in found.values())
    assert max(each["off"] for each in found.values()) < TOLERANCE


def on_eight_devices(folders: list[str]) -> dict[str, dict]:
    found = {}
    for path in folders:
        family = Path(path).name
        run = lm.load(path, mesh=Mesh(fsdp=2, tensor=4))
        devices = {len(x.sharding.device_set) for x in jax.tree.leaves(run.params)}
        split = run.params["blocks"]["0"]["attention"]["q"].addressable_shards[0].data.size
        assert split * 8 == run.params["blocks"]["0"]["attention"]["q"].size
        found[family] = {"off": float(off(run, reference(family))), "devices": min(devices)}
    return found


if __name__ == "__main__":
    print(json.dumps(on_eight_devices(sys.argv[1:])))
