"""Stages with adapters: what the next stage starts from, and what a run folder holds."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from tiny_experiments import config, experiment

import lm
from lm import checkpoint, model, optim, quant, trees
from lm.errors import UserError

TOKENS = np.arange(40).reshape(2, 20)
LORA = model.LoRA(rank=4)


def stage(name, start=None, steps=2, **fields):
    base = config(dim=32)
    return experiment(
        name=name,
        start=start,
        model=replace(base, **fields),
        schedule=optim.Constant(peak=1e-2, steps=steps),
        save=checkpoint.Save(every=steps),
        evals=(),
        sample=None,
    )


def logits(run):
    return np.asarray(run.logits(TOKENS))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def adapted(workdir):
    """A run of two steps, and one with a LoRA that starts from it."""
    first = lm.train(stage("first"), workdir=workdir)
    return lm.train(stage("adapted", str(first.folder), adapter=LORA), workdir=workdir)


def test_a_checkpoint_holds_the_adapter_alone(adapted):
    store = checkpoint.Store(adapted.folder / "checkpoints")
    stored = store.restore_params()
    assert trees.flatten(stored).keys() == {
        path for path in trees.flatten(adapted.params) if path.startswith("adapter/")
    }
    np.testing.assert_array_equal(logits(lm.load(adapted.folder)), logits(adapted))


def first_state(experiment, workdir):
    from lm.program import assemble
    from lm.start import Start

    program = assemble(experiment)
    state, frozen = Start.of(experiment, workdir).state(program)
    return trees.merge(state.params, frozen)


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"adapter": LORA}, 0),
        pytest.param({"adapter": replace(LORA, dropout=0.5)}, 0, marks=pytest.mark.slow),
        # The change is added to the weights in float32.
        ({}, 1e-5),
        ({"adapter": replace(LORA, rank=2)}, 1e-5),
        pytest.param({"adapter": model.Bottleneck(hidden=4)}, 1e-5, marks=pytest.mark.slow),
    ],
    ids=["the same", "with dropout", "none", "another rank", "another kind"],
)
def test_the_next_stage_starts_from_the_adapted_model(fields, limit, adapted, workdir):
    following = stage("next", str(adapted.folder), **fields)
    params = first_state(following, workdir)
    before = logits(adapted)
    after = logits(dataclasses.replace(adapted, params=params, experiment=following))
    assert np.abs(after - before).max() <= limit * np.abs(before).max()
    plain = logits(lm.load(workdir / "first"))
    assert np.abs(before - plain).max() > 1e-2 * np.abs(before).max()


@pytest.mark.slow
def test_a_quantized_stage_resumes_and_opens(adapted, workdir):
    """Two steps, then two more, equal four: the frozen codes are read back as they were."""
    declared = stage("q", str(workdir / "first"), 4, adapter=LORA, quant=quant.NF4(block=16))
    declared = replace(declared, save=checkpoint.Save(every=2, keep_last=9))
    whole = lm.train(declared, workdir=workdir)
    (workdir / "q" / "checkpoints" / "4").rename(workdir / "kept")
    again = lm.train(declared, workdir=workdir)
    for path, x in trees.flatten(whole.params).items():
        if path.startswith("adapter/"):
            np.testing.assert_array_equal(x, trees.flatten(again.params)[path])
    np.testing.assert_array_equal(logits(lm.load(workdir / "q")), logits(whole))


@pytest.mark.slow
def test_a_prefix_cannot_be_dropped(workdir, adapted):
    prefix = stage("prefix", str(workdir / "first"), adapter=model.Prefix(tokens=2))
    run = lm.train(prefix, workdir=workdir)
    with pytest.raises(UserError, match=r"Prefix\(\.\.\.\), which cannot be merged"):
        lm.train(stage("dropped", str(run.folder)), workdir=workdir)


def test_quantized_weights_cannot_train(workdir):
    with pytest.raises(UserError, match=r"model\.quant=NF4\(\.\.\.\) quantizes blocks/0/"):
        lm.train(stage("bad", quant=quant.NF4(block=16)), workdir=workdir)


def test_a_missing_tokenizer_and_start_are_named():
    with pytest.raises(UserError, match=r"tokenizer=None takes the tokenizer of `start`"):
        replace(stage("x"), tokenizer=None)
