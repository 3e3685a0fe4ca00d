"""Adapters of PEFT 0.21 (tests/oracles) are read, computed, merged, trained and written alike."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from oracles import tiny
from safetensors.numpy import load_file

import lm
from lm import exchange, hf, model, objectives
from lm.data.batch import Batch
from lm.hf import families

RECORDED = tiny.read("adapters")
TOKENS, POSITIONS = RECORDED["tokens"].astype(np.int32), RECORDED["positions"]
NAMES = [key.removesuffix("/logits") for key in RECORDED if key.endswith("/logits")]
LORA = [name for name in NAMES if "prefix" not in name]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """opened(name): a PEFT folder, beside the folder of its model, as a Run."""
    to = tmp_path_factory.mktemp("peft")

    @functools.cache
    def make(name):
        shutil.copytree(tiny.RECORDED / name, to / name)
        tiny.write_model(to / name / "base", tied=name.startswith("tied"))
        return lm.load(to / name)

    return make


def close(ours, want):
    """Within 1e-5 of the largest entry: float32 sums of a hundred terms in another order."""
    np.testing.assert_allclose(ours, want, rtol=0, atol=1e-5 * np.abs(want).max())


def logits(run):
    return np.asarray(run.logits(TOKENS))[:, POSITIONS]


@pytest.mark.parametrize("name", NAMES)
def test_logits(name, opened):
    close(logits(opened(name)), RECORDED[f"{name}/logits"])


@pytest.mark.parametrize("name", LORA)
def test_merged_logits(name, opened, tmp_path):
    """The exported model computes what PEFT's merged one does. Of the models with a tied embedding
    that is adapted, PEFT's merged one computes something else; ours what the adapted one does."""
    merged = lm.load(exchange.export_run(opened(name).folder, tmp_path / "out", merge=True))
    assert merged.experiment.model.adapter is None
    close(logits(merged), RECORDED.get(f"{name}/merged", RECORDED[f"{name}/logits"]))
    adapts_tied = name.startswith("tied_")
    assert (f"{name}/merged" not in RECORDED) == adapts_tied


@pytest.mark.parametrize("name", ["lora", "rslora", "prefix"])
def test_gradients(name, opened, tmp_path):
    run = opened(name)
    config = run.experiment.model
    shape = TOKENS[:, 1:].shape
    batch = Batch(
        tokens=TOKENS[:, :-1],
        targets=TOKENS[:, 1:],
        weights=np.ones(shape, np.float32),
        segments=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    )

    @jax.jit
    def compute(params):
        def mean(params):
            loss = objectives.NextToken().loss(model.Model(config, params), batch, None, {})
            return loss.total / loss.weight

        return jax.value_and_grad(mean)(params)

    loss, grads = compute(run.params)
    assert loss == pytest.approx(float(RECORDED[f"{name}/loss"]), rel=1e-5)
    # Writing is linear in the weights, and so gives the gradients PEFT's names and axes.
    written = write(tmp_path, config, grads)
    for key, want in RECORDED.items():
        if key.startswith(f"{name}/grad/"):
            close(written[key.removeprefix(f"{name}/grad/")], want)


@pytest.mark.parametrize("name", ["lora", "rslora", "lora_head", "tied", "tied_both", "prefix"])
def test_written_folder(name, opened, tmp_path):
    """What was read is written as it was, up to the rotation of a prefix's keys and back."""
    run = opened(name)
    written, want = (
        write(tmp_path, run.experiment.model, run.params),
        tiny.read_adapter(name),
    )
    assert want.keys() <= written.keys()
    for key, x in want.items():
        np.testing.assert_allclose(written[key], x, rtol=0, atol=1e-6 if name == "prefix" else 0)
    ours, theirs = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path, tiny.RECORDED / name)
    )
    modules = {each.split(".")[-1] for each in theirs.pop("target_modules", [])}
    if name == "tied_both":
        modules.add("lm_head")  # PEFT adds it when it reads ensure_weight_tying
    assert set(ours.pop("target_modules", [])) == modules
    assert ours == {key: theirs[key] for key in ours}


def write(folder, config, params):
    """The tensors of the adapter as `hf.write_adapter` writes them."""
    base = dataclasses.replace(config, adapter=None)
    family, _ = families.write(base, 256)
    weights = model.adapter_weights(config, params)
    hf.write_adapter(folder, family, config, weights, "base")
    tensors = load_file(folder / "adapter_model.safetensors")
    if "prompt_embeddings" in tensors:  # PEFT's name of the same weight in training
        tensors["prompt_encoder.embedding.weight"] = tensors["prompt_embeddings"]
    return tensors
