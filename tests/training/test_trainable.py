"""Frozen weights: `Experiment.trainable` selects the weights to train by their paths."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import tiny_experiments
from train_examples import DENSE, batch

import lm
from lm import checkpoint, data, model, objectives, optim, training, trees
from lm.errors import UserError
from lm.experiment import override
from lm.parallel.mesh import Mesh
from lm.precision import Precision
from lm.program import assemble

PATTERN = ("blocks/*/attention/**",)
RATE = 0.1
# The weights are large enough for the attention scores to have a gradient.
CONFIG = dataclasses.replace(DENSE, init=model.Normal(std=0.5), embed_std=1.0)


def flat_arrays(tree) -> dict[str, np.ndarray]:
    """Path -> a copy that donation cannot delete."""
    return {path: np.array(x) for path, x in trees.flatten(tree).items()}


def attends(path: str) -> bool:
    return path.startswith("blocks/") and "/attention/" in path


# One step


def first_step(trainable, optimizer):
    """Returns (trained weights before the first step, frozen weights, trained weights after it,
    metrics); the weights are numpy arrays."""
    schedule, mesh, precision = optim.Constant(peak=RATE, steps=10), Mesh().build(), Precision()
    axes, _ = trees.partition(model.axes(CONFIG), trainable)
    transformation = optimizer.build(schedule.at, axes)
    shardings = training.state_shardings(
        CONFIG, transformation, precision, mesh, trainable=trainable
    )
    state, frozen = training.init_state(CONFIG, transformation, precision, 0, shardings, trainable)
    step = training.make_step(
        *(CONFIG, objectives.NextToken(), optimizer, schedule.at, precision), trainable=trainable
    )
    before = flat_arrays(state.params)
    after, metrics = training.compile_step(step, shardings, mesh)(state, batch(), frozen)
    return before, flat_arrays(frozen), flat_arrays(after.params), metrics


def test_gradients_match_those_of_full_training():
    """With plain SGD, the change of a weight shows its gradient. It is the same as in full
    training, since the forward pass is the same."""
    before, nothing, after, metrics = first_step(training.ALL, optim.SGD())
    assert not nothing
    some_before, frozen, some_after, some_metrics = first_step(PATTERN, optim.SGD())
    assert set(some_before) == {path for path in before if attends(path)}
    assert set(frozen) == {path for path in before if not attends(path)}
    for path, start in {**some_before, **frozen}.items():
        np.testing.assert_array_equal(start, before[path])
    assert metrics["loss"] == pytest.approx(float(some_metrics["loss"]), rel=1e-6)
    for path, start in some_before.items():
        full, some = after[path] - start, some_after[path] - start
        # Two programs sum in different orders; weights round to multiples of eps times their size.
        size, change = np.abs(start).max(), np.abs(full).max()
        assert change > 1e-3
        np.testing.assert_allclose(some, full, rtol=0, atol=2.4e-7 * size + 1e-4 * change)
    # The reported norm covers only the gradients of the trained weights.
    norm = np.sqrt(sum(np.sum(((some_after[p] - w) / RATE) ** 2) for p, w in some_before.items()))
    assert some_metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert some_metrics["grad_norm"] < metrics["grad_norm"]


# Whole runs


def experiment(**fields):
    return dataclasses.replace(
        tiny_experiments.experiment(), **{"trainable": PATTERN, "evals": (), **fields}
    )


@pytest.fixture(scope="module")
def frozen_run(tmp_path_factory):
    """(workdir, the experiment, its run)."""
    workdir, declared = tmp_path_factory.mktemp("frozen"), experiment()
    return workdir, declared, lm.train(declared, workdir=workdir)


def stored(folder) -> list[str]:
    """Paths stored in the newest checkpoint."""
    store = checkpoint.Store(folder)
    return list(store._stored(store.latest()))


def test_only_the_selected_weights_change(frozen_run):
    _, declared, run = frozen_run
    state, frozen = assemble(declared).init()
    start, end = flat_arrays(trees.merge(state.params, frozen)), flat_arrays(run.params)
    assert start.keys() == end.keys()
    for path, weight in start.items():
        assert np.array_equal(weight, end[path]) == (not attends(path)), path


def test_frozen_weights_have_no_optimizer_state_and_are_saved_once(frozen_run):
    workdir, declared, _ = frozen_run
    folder = workdir / declared.name
    in_checkpoint, in_frozen = stored(folder / "checkpoints"), stored(folder / "frozen")
    weights = [p.removeprefix("params/") for p in in_checkpoint if p.startswith("params/")]
    assert weights and all(map(attends, weights))
    everything = set(trees.flatten(model.shapes(declared.model)))
    assert {p.removeprefix("params/") for p in in_frozen} == everything - set(weights)
    moments = [p for p in in_checkpoint if p.startswith("opt_state/") and "/blocks/" in p]
    assert len(moments) == 2 * len(weights)
    assert not [p for p in in_checkpoint if "embed/" in p or "/ffn/" in p or "final_norm" in p]
    state, frozen = assemble(declared).abstract
    arrays = [x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sorted(arrays) == sorted(2 * [x.shape for x in jax.tree.leaves(state.params)])
    assert trees.count(state.params) + trees.count(frozen) == trees.count(
        model.shapes(declared.model)
    )


def test_run_with_frozen_weights_loads(frozen_run):
    workdir, declared, run = frozen_run
    loaded = lm.load(workdir / declared.name)
    expected, opened = flat_arrays(run.params), flat_arrays(loaded.params)
    assert expected.keys() == opened.keys()
    for path, weight in expected.items():
        np.testing.assert_array_equal(opened[path], weight)
    assert loaded.step == run.step == tiny_experiments.STEPS
    assert loaded.experiment.trainable == PATTERN
    assert isinstance(loaded.generate("the tree", max_tokens=4), str)


@pytest.mark.parametrize("lost", ["checkpoints/8", "checkpoints"])
def test_run_with_frozen_weights_resumes(frozen_run, tmp_path, lost):
    """Resumes from the checkpoint in the middle or, without any checkpoint, from the beginning.
    Losses and weights are bitwise equal."""
    workdir, declared, run = frozen_run
    shutil.copytree(workdir, tmp_path / "copy")
    folder = tmp_path / "copy" / declared.name
    expected_losses = tiny_experiments.losses(folder)
    shutil.rmtree(folder / lost)
    again = lm.train(declared, workdir=tmp_path / "copy")
    assert tiny_experiments.losses(folder) == expected_losses
    expected, resumed = flat_arrays(run.params), flat_arrays(again.params)
    for path, weight in expected.items():
        np.testing.assert_array_equal(resumed[path], weight)


def test_all_weights_train_by_default(tiny):
    assert not (tiny.folder / "frozen").exists()
    weights = [p for p in stored(tiny.folder / "checkpoints") if p.startswith("params/")]
    assert len(weights) == len(trees.flatten(model.shapes(tiny.declare().model)))


def test_fine_tuning_may_freeze_weights(tiny, tmp_path):
    """Fine-tunes some weights of a finished run."""
    declared = experiment(
        name="tuned",
        start=str(tiny.folder),
        tokenizer=data.TokenizerFile(path=str(tiny.folder)),
        schedule=optim.Constant(peak=1e-2, steps=2),
    )
    run = lm.train(declared, workdir=tmp_path)
    before, after = flat_arrays(lm.load(tiny.folder).params), flat_arrays(run.params)
    for path, weight in before.items():
        assert np.array_equal(weight, after[path]) == (not attends(path)), path


def test_invalid_patterns_raise_errors():
    with pytest.raises(UserError, match=r"trainable='blocks/\*/atention/\*\*' matches no weight"):
        experiment(trainable=("blocks/*/atention/**",))
    with pytest.raises(UserError, match=r"trainable='blocks/9/\*\*' matches no weight"):
        experiment(trainable=(*PATTERN, "blocks/9/**"))
    with pytest.raises(UserError, match=r"trainable=\(\) trains nothing"):
        experiment(trainable=())
    with pytest.raises(UserError, match=r"must be a list of text\. Write it as a tuple"):
        experiment(trainable=["embed/**"])
    changed = override(experiment(), ["trainable=embed/**,final_norm/scale"])
    assert changed.trainable == ("embed/**", "final_norm/scale")


@pytest.mark.parametrize(
    "path, pattern, matches",
    [
        ("blocks/0/attention/q", "blocks/*/attention/**", True),
        ("blocks/0/attention/q_norm/scale", "blocks/*/attention/**", True),
        ("blocks/0/ffn/up", "blocks/*/attention/**", False),
        ("blocks/0/ffn/up", "blocks/*", False),
        ("embed/table", "**", True),
        ("embed/table", "**/table", True),
        ("blocks/0/attention/q_bias", "**/*_bias", True),
        ("blocks/0/attention/q", "**/[qk]", True),
    ],
)
def test_patterns_match_paths(path, pattern, matches):
    assert trees.matches(path, pattern) == matches
