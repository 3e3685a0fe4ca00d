"""A recipe of two stages: training in order, resuming in the second stage, and overrides."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_experiments import experiment, losses

import lm
from lm import checkpoint, data, evals, optim
from lm.commands import flags
from lm.errors import UserError
from lm.experiment import Stage
from lm.recipe import Recipe, override

HERE = Path(__file__).parent
STEPS = 8


def recipe(optimizer: str = "keep") -> Recipe:
    first = experiment(name="first", evals=())
    second = dataclasses.replace(
        first,
        evals=(evals.Perplexity(every=STEPS, batches=1),),
        name="second",
        start=Stage("first", optimizer=optimizer),
        tokenizer=Stage("first"),
        data=data.Documents(texts=first.data.texts[::-1], held_out=0.1),
        schedule=optim.Linear(peak=1e-3, warmup=2, steps=STEPS),
    )
    return Recipe(name="both", stages=(first, second))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of the recipe, trained without interruption."""
    workdir = tmp_path_factory.mktemp("stages")
    run = lm.train(recipe(), workdir=workdir)
    assert run.folder == workdir / "both" / "second"
    return workdir / "both"


def state_at(folder: Path, step: int) -> dict:
    """Returns the arrays of a checkpoint by path."""
    from orbax.checkpoint import v1 as ocp

    tree = ocp.load(str(folder / "checkpoints" / str(step)))
    return {
        jax.tree_util.keystr(k): np.asarray(x) for k, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_the_second_stage_starts_near_the_final_loss_of_the_first(trained):
    first, second = losses(trained / "first"), losses(trained / "second")
    assert len(first) == len(second) == STEPS
    # The second stage starts at the final loss of the first, not at that of random weights. The
    # different text changes the loss by less than a tenth of its decrease in the first stage.
    learned = first[0] - first[-1]
    assert learned > 0.5
    assert abs(second[0] - first[-1]) < 0.3 * learned
    assert second[-1] < first[-1] + 0.3 * learned


def test_the_second_stage_first_evaluates_the_weights_of_the_first(trained):
    """The evaluation at step 0 uses the weights that the stage starts from."""
    lines = [json.loads(line) for line in (trained / "second" / "eval.jsonl").open()]
    values = {(line["step"], line["name"].split("/")[-1]): line["value"] for line in lines}
    assert sorted({step for step, _ in values}) == [0, STEPS]
    first = lm.load(trained / "first").apply
    ours = dataclasses.replace(lm.load(trained / "second"), params=first.params)
    result = next(r for r in ours.evaluate() if r.name.endswith("/loss"))
    assert values[0, "loss"] == pytest.approx(result.value, rel=1e-5)


def test_the_optimizer_state_is_kept_or_reset(trained, tmp_path):
    """Adam's step count continues or restarts accordingly; the schedule restarts in both cases."""
    kept = state_at(trained / "second", STEPS)
    lm.train(recipe("reset"), workdir=tmp_path)
    reset = state_at(tmp_path / "both" / "second", STEPS)
    counts = [name for name in kept if name.endswith("['count']")]
    assert counts
    assert {int(kept[name]) for name in counts} == {2 * STEPS}
    assert {int(reset[name]) for name in counts} == {STEPS}
    assert int(kept["['step']"]) == int(reset["['step']"]) == STEPS
    line = json.loads((trained / "second" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["learning_rate"] == pytest.approx(5e-4)


def test_stages_share_the_tokenizer(trained):
    names = ("tokenizer.model", "tokenizer.json")
    files = [
        next(trained / s / n for n in names if (trained / s / n).exists())
        for s in ("first", "second")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_tokenizer_is_refused(tmp_path):
    first, second = recipe().stages
    other = dataclasses.replace(second, tokenizer=data.SentencePiece(vocab=300))
    with pytest.raises(UserError, match="trained with another tokenizer"):
        lm.train(Recipe(name="both", stages=(first, other)), workdir=tmp_path)


def test_files_of_later_stages_are_looked_for_before_the_first_is_trained(tmp_path):
    """Once a stage is trained, its files may go."""
    text = tmp_path / "text.txt"
    first, second = recipe().stages
    missing = dataclasses.replace(second, data=data.Text(str(text), held_out=0.1))
    both = Recipe(name="both", stages=(first, missing))
    with pytest.raises(UserError, match="Stage second: .*text.txt"):
        lm.train(both, workdir=tmp_path)
    assert not (tmp_path / "both").exists()
    elsewhere = dataclasses.replace(first, name="third", start=str(tmp_path / "no_run"))
    with pytest.raises(UserError, match="Stage third: .*no_run"):
        lm.train(dataclasses.replace(both, stages=(first, elsewhere)), workdir=tmp_path)


def test_a_complete_recipe_is_not_trained_again(trained, capsys):
    before = (trained / "second" / "metrics.jsonl").stat().st_mtime_ns
    assert lm.train(recipe(), workdir=trained.parent).step == STEPS
    assert (trained / "second" / "metrics.jsonl").stat().st_mtime_ns == before
    out = capsys.readouterr().out
    assert "is complete" in out
    # In the form that a recipe accepts.
    assert f"--set first.schedule.steps={2 * STEPS}" in out
    assert f"--set second.schedule.steps={2 * STEPS}" in out


def test_a_stage_killed_before_its_first_checkpoint_starts_over(trained, tmp_path):
    """From the previous stage, not random weights, although experiment.json exists already."""
    runs = tmp_path / "both"
    shutil.copytree(trained, runs)
    for name in ("checkpoints", "metrics.jsonl", "eval.jsonl", "plots"):
        path = runs / "second" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert (runs / "second" / "experiment.json").exists()
    lm.train(recipe(), workdir=tmp_path)
    assert losses(runs / "second") == losses(trained / "second")


@pytest.mark.slow
def test_a_recipe_killed_in_the_second_stage_resumes_there(trained, tmp_path):
    script = (
        "import sys, lm; sys.path.insert(0, sys.argv[2]); from test_stages import recipe; "
        "lm.train(recipe(), workdir=sys.argv[1])"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(HERE)]
    paths = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent)))
    environment = os.environ | {"PYTHONPATH": paths}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    store = checkpoint.Store(tmp_path / "both" / "second" / "checkpoints")
    end = time.monotonic() + 120
    while not store.steps() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (tmp_path / "both" / "first" / "metrics.jsonl").stat().st_mtime_ns
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "both" / "first" / "metrics.jsonl").stat().st_mtime_ns == first
    assert losses(tmp_path / "both" / "second") == losses(trained / "second")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("schedule.steps=3", "must begin with a stage of the recipe, as in first.schedule.steps=3"),
        ("secnd.schedule.steps=3", "Did you mean 'second'"),
        ("second.schedule.stepz=3", "Did you mean 'schedule.steps'"),
        ("second.name=x", "would rename a stage"),
    ],
)
def test_invalid_overrides_are_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        override(recipe(), [change])


def test_a_setting_without_a_stage_is_not_suggested_as_its_own_fix():
    """`steps` is a synonym of schedule.steps; schedule.steps is not a synonym of itself."""
    with pytest.raises(UserError, match=r"must begin with a stage .* first\.schedule\.steps=3"):
        flags.change(recipe(), ["schedule.steps=3"])
    with pytest.raises(
        UserError, match=r"second\.lr is not known; that setting is second\.schedule"
    ):
        flags.change(recipe(), ["second.lr=3"])


def test_overrides_change_a_stage_and_the_name():
    changed = override(recipe(), ["second.schedule.steps=3", "first.log.every=1"])
    assert changed.stage("second").schedule.steps == 3
    assert changed.stage("first").log.every == 1
    assert changed.name == "both+second.schedule.steps=3"
    assert override(recipe(), ["name=mine", "second.seed=1"]).name == "mine"


def test_invalid_recipes_are_refused():
    first, second = recipe().stages
    with pytest.raises(UserError, match="not an earlier stage"):
        Recipe(name="both", stages=(second, first))
    with pytest.raises(UserError, match="'first' twice"):
        Recipe(name="both", stages=(first, first))
    with pytest.raises(UserError, match="one experiment at least"):
        Recipe(name="both", stages=())
    with pytest.raises(UserError, match="has not been trained"):
        lm.train(second, workdir="nowhere")
    with pytest.raises(UserError, match="start.optimizer='kep'"):
        Stage("first", optimizer="kep")
