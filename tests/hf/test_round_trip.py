"""For every family, logits and greedy decoding equal those of transformers, on one device and on
eight, and a folder is unchanged after an import and an export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import virtual_devices
from hf_folders import FAMILIES, read_weights, reference

import lm
from lm import exchange, generate
from lm.parallel.mesh import Mesh

# Both sides use float32. A different order of summation changes logits by 1e-5 here; a wrong
# window, soft cap or scaling changes them by more than 0.1.
TOLERANCE = 2e-4


def error(run, expected) -> float:
    """Returns the largest difference from the reference logits."""
    logits_btv = np.asarray(run.logits(expected["tokens"]))[:, expected["positions"]]
    return np.abs(logits_btv - expected["logits"]).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, opened):
    assert error(opened(family), reference(family)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_with_the_kv_cache_equals_that_of_transformers(family, opened):
    run, expected = opened(family), reference(family)
    prompt, text = expected["greedy_prompt"][0].tolist(), expected["greedy"][0].tolist()
    (generated,) = generate.generate(
        run.apply.cast(),
        [prompt],
        context=64,
        max_tokens=len(text) - len(prompt),
        sampling=generate.Sampling(temperature=0),
    )
    assert prompt + generated.tokens == text


@pytest.mark.parametrize("family", FAMILIES)
def test_import_and_export_are_lossless(family, folder, tmp_path):
    """Imports into a run folder and exports to several files. The weights stay the same bit for
    bit, and so do the model, the family and the ids."""
    imported = exchange.import_run(folder(family), tmp_path / "run")
    out = exchange.export_run(tmp_path / "run", tmp_path / "out", shard_bytes=200_000)
    before, after = read_weights(folder(family)), read_weights(out)
    assert before.keys() == after.keys()
    assert all(x.dtype == after[name].dtype for name, x in before.items())
    assert all(x.tobytes() == after[name].tobytes() for name, x in before.items())
    assert len(list(out.glob("*.safetensors"))) > 1
    exported = lm.load(out)
    assert exported.experiment.model == imported.experiment.model
    original, new = (json.loads((f / "config.json").read_text()) for f in (folder(family), out))
    for field in original.keys() & new.keys():
        assert original[field] == new[field], field
    assert error(lm.load(tmp_path / "run"), reference(family)) < TOLERANCE


def test_bfloat16_weights_stay_bfloat16(opened):
    dtypes = {x.dtype.name for x in jax.tree.leaves(opened("llama3").params)}
    assert dtypes == {"bfloat16"}


@pytest.mark.slow
def test_eight_devices_compute_the_same_logits(folder):
    """One subprocess loads the weights of all families onto the mesh."""
    folders = [str(folder(family)) for family in FAMILIES]
    here = Path(__file__)
    environment = os.environ | {
        "XLA_FLAGS": virtual_devices.flags(8),
        "PYTHONPATH": os.pathsep.join(map(str, (here.parents[2], here.parents[1], here.parent)))
        + os.pathsep
        + os.environ.get("PYTHONPATH", ""),
    }
    command = [sys.executable, str(here), *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results.keys() == set(FAMILIES)
    assert all(each["devices"] == 8 for each in results.values())
    assert max(each["error"] for each in results.values()) < TOLERANCE


def on_eight_devices(folders: list[str]) -> dict[str, dict]:
    results = {}
    for path in folders:
        family = Path(path).name
        run = lm.load(path, mesh=Mesh(fsdp=2, tensor=4))
        devices = {len(x.sharding.device_set) for x in jax.tree.leaves(run.params)}
        split = run.params["blocks"]["0"]["attention"]["q"].addressable_shards[0].data.size
        assert split * 8 == run.params["blocks"]["0"]["attention"]["q"].size
        results[family] = {"error": float(error(run, reference(family))), "devices": min(devices)}
    return results


if __name__ == "__main__":
    print(json.dumps(on_eight_devices(sys.argv[1:])))
