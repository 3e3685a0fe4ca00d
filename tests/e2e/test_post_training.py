"""Pre-training, LoRA fine-tuning on conversations and DPO as one recipe: what each stage starts
from, what it saves, what it prints, and that it survives being killed."""

import contextlib
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from tiny_experiments import config, experiment, losses, texts

import lm
from lm import checkpoint, data, evals, model, objectives, optim, prepared, training, trees
from lm.experiment import Stage
from lm.recipe import Recipe

HERE = Path(__file__).parent
STAGES = ("pretrain", "sft", "dpo")
STEPS = 24
ANSWERS = {"light": "a tree", "stone": "a river", "night": "one sky", "tree": "the light"}


def recipe(folder: Path) -> Recipe:
    """The recipe, with its conversations and pairs in `folder`."""
    records = [
        {"prompt": f"the {word} {i}", "chosen": answer, "rejected": f"by {answer}"}
        for i in range(24)
        for word, answer in ANSWERS.items()
    ]
    path = folder / "pairs.jsonl"
    if not path.exists():  # its time of change is part of the fingerprint of the data
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    pretrain = experiment(
        name="pretrain",
        model=config(vocab=330, dim=32),
        tokenizer=data.SentencePiece(vocab=330, symbols=data.CHAT_SYMBOLS),
        data=data.Documents(texts=texts(), held_out=0.1),
        schedule=optim.Constant(peak=1e-2, steps=STEPS),
        save=checkpoint.Save(every=6),
        evals=(evals.Perplexity(every=STEPS),),
    )
    sft = replace(
        pretrain,
        name="sft",
        start=Stage("pretrain"),
        model=replace(pretrain.model, adapter=model.LoRA(rank=4)),
        tokenizer=Stage("pretrain"),
        data=data.Chat(str(path), held_out=0.1),
        schedule=optim.Constant(peak=1e-2, steps=STEPS),
    )
    dpo = replace(
        sft,
        name="dpo",
        start=Stage("sft"),
        data=data.Preferences(str(path), held_out=0.1),
        batch=data.BatchShape(sequences=4, length=64, packing=data.Pairs()),
        objective=objectives.DPO(beta=0.1),
        schedule=optim.Constant(peak=2e-3, steps=STEPS),
        evals=(evals.Validation(every=STEPS),),
        sample="the stone 3",
    )
    return Recipe(name="assistant", stages=(pretrain, sft, dpo))


class Trained(NamedTuple):
    """The recipe, the folder of its stages, and what it printed to stdout and stderr."""

    recipe: Recipe
    folder: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    workdir = tmp_path_factory.mktemp("post_training")
    out, err = io.StringIO(), io.StringIO()
    declared = recipe(workdir)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        lm.train(declared, workdir=workdir / "runs")
    return Trained(declared, workdir / "runs" / "assistant", out.getvalue(), err.getvalue())


def held_out(folder: Path, step: int) -> dict[str, float]:
    """Results of the evaluation at a step."""
    lines = training.read_lines(folder / "eval.jsonl")
    return {each["name"]: each["value"] for each in lines if each["step"] == step}


def test_dpo_begins_at_ln_2(trained):
    first = held_out(trained.folder / "dpo", 0)
    # Policy and reference are the same weights, computed by the same operations.
    assert first["preferences/margin"] == 0
    assert first["preferences/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert losses(trained.folder / "dpo")[0] == pytest.approx(math.log(2), rel=1e-5)


def test_the_reference_of_dpo_is_the_stage_that_it_started_from(trained):
    """Not the weights without the adapter of that stage."""
    stage = trained.recipe.stage("dpo")
    loaded = {name: lm.load(trained.folder / name).apply for name in STAGES}
    pairs = prepared.prepare(stage, trained.folder).evaluation("preferences", 64, 4)

    def margin(reference):
        models = {"reference": loaded[reference]}
        results = evals.validate(loaded["dpo"], stage.objective, models, pairs)
        return {result.name: result.value for result in results}["preferences/margin"]

    recorded = held_out(trained.folder / "dpo", STEPS)["preferences/margin"]
    assert recorded > 0.02, "training has separated the pairs"
    assert margin("sft") == pytest.approx(recorded, abs=1e-5)  # sums of float32 log-probabilities
    assert abs(margin("pretrain") - recorded) > 1e-3


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_checkpoints_of_adapters_hold_adapters_alone(trained, stage):
    state = arrays(trained.folder / stage)
    shapes = trees.flatten(model.shapes(trained.recipe.stage(stage).model))
    adapter = {path: x.shape for path, x in shapes.items() if path.startswith("adapter/")}
    params = {
        key.split("/", 1)[1]: x.shape for key, x in state.items() if key.startswith("params/")
    }
    assert params == adapter
    moments = sum(x.size for key, x in state.items() if key.startswith("opt_state/") and x.ndim)
    assert moments == 2 * sum(math.prod(shape) for shape in adapter.values()), "Adam has two each"


def test_each_stage_prints_what_it_is_about(trained):
    pretrain, sft, dpo = trained.err.split("Stage ")[1:]
    assert "bits/byte" in pretrain and "bits/byte" in sft
    assert "bits/byte" not in dpo and "margin" not in sft
    assert f"step  1/{STEPS}  loss 0.6931  accuracy 0.000  margin 0.000  lr" in dpo

    pretrain, sft, dpo = trained.out.split("Trained ")[1:]
    assert "bits per byte (documents)" in pretrain and "by xz -9" in pretrain
    assert "bits per byte of answers (chat)" in sft and "xz" not in sft
    for measure in ("loss", "accuracy", "margin"):
        assert f" {measure} (preferences)\n" in dpo
    assert "Sample\n    user: the stone 3\n    assistant:" in dpo
    assert "lm generate" in pretrain
    for stage, printed in (("sft", sft), ("dpo", dpo)):
        assert f"python -m lm chat {trained.folder / stage}\n" in printed


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of the newest checkpoint by path."""
    from orbax.checkpoint import v1 as ocp

    store = checkpoint.Store(folder / "checkpoints")
    tree = ocp.load(str(folder / "checkpoints" / str(store.latest())))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


# ---- Killed at random moments


def start(home: Path) -> subprocess.Popen:
    script = (
        "import sys, lm; from pathlib import Path; from test_post_training import recipe; "
        "home = Path(sys.argv[1]); lm.train(recipe(home.parent), workdir=home)"
    )
    paths = os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1])))
    with (home / "log.txt").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-c", script, str(home)],
            env=os.environ | {"PYTHONPATH": paths},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(home: Path) -> None:
    process = start(home)
    assert process.wait(timeout=600) == 0, (home / "log.txt").read_text()[-3000:]


def kill(home: Path, stage: str, step: int, seconds: float) -> None:
    """Starts the recipe, and kills it so many seconds after it has logged this step of a stage."""
    metrics = home / "assistant" / stage / "metrics.jsonl"

    def logged() -> int:
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

    before = logged()
    process = start(home)
    while process.poll() is None and (logged() < step or logged() == before):
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the recipe was complete before it could be killed"
    print(f"killed {seconds:.2f} s after step {step} of {stage}, at step {logged()}")


@pytest.mark.slow
def test_a_recipe_killed_at_random_moments_gives_the_same_weights(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for home in (undisturbed, killed):
        home.mkdir()
    finish(undisturbed)  # fills the compilation cache

    draw = random.Random(0)
    for stage in sorted([*STAGES, *draw.choices(STAGES, k=2)], key=STAGES.index):
        kill(killed, stage, draw.randrange(1, STEPS // 2), draw.uniform(0, 0.1))
    finish(killed)

    for stage in STAGES:
        ours, theirs = (home / "assistant" / stage for home in (killed, undisturbed))
        assert losses(ours) == losses(theirs)  # each step once
        assert held_out(ours, STEPS) == held_out(theirs, STEPS)
        state, expected = arrays(ours), arrays(theirs)
        assert state.keys() == expected.keys()
        for path, x in state.items():
            assert x.tobytes() == expected[path].tobytes(), (stage, path)
    assert "Traceback" not in (killed / "log.txt").read_text()
