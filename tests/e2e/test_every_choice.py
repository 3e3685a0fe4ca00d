"""Every option of an experiment trains: the loss decreases over a few steps of run.train."""

import dataclasses
import json

import pytest
from tiny_experiments import config, experiment, losses, texts

from lm import data, model, optim, run
from lm.errors import UserError
from lm.parallel import hardware
from lm.parallel.mesh import Mesh, Place
from lm.precision import BF16, FP16

LAYER = config(layers=1)
STEPS = 12


def declare(**fields):
    """The tiny experiment with one layer, no evaluation and a constant high learning rate."""
    base = experiment(
        model=LAYER, schedule=optim.Constant(peak=2e-2, steps=STEPS), evals=(), save=SAVE
    )
    return dataclasses.replace(base, **fields)


SAVE = dataclasses.replace(experiment().save, every=STEPS)


def moe(**fields):
    return config(layers=1, ffn=model.MoE(experts=4, experts_per_token=2, hidden=16, **fields))


def two_sources(weights):
    sources = {
        "one": data.Documents(texts=texts(20, seed=1), held_out=0.1),
        "two": data.Documents(texts=tuple(t.upper() for t in texts(20, seed=2)), held_out=0.1),
    }
    return data.Mixture(sources=sources, weights=weights)


VARIANTS = {
    "batch ramp": declare(batch=data.BatchShape(sequences=4, length=32, ramp=((6, 2),))),
    "mixture": declare(data=two_sources(((0, {"one": 0.9, "two": 0.1}), (6, {"two": 1.0})))),
    "windows": declare(batch=data.BatchShape(sequences=4, length=32, packing=data.Concatenate())),
    "bf16": declare(precision=BF16),
    "fp16": declare(precision=FP16),
    "moe": declare(model=moe()),
    "moe bias": declare(model=moe(router=model.SigmoidRouter(), balance=model.BiasBalance())),
    "moe capacity": declare(model=moe(dispatch=model.Capacity(factor=1.25), z_loss=1e-3)),
    "dropout": declare(model=config(layers=1, dropout=0.1)),
    "remat": declare(places={"cpu": Place(mesh=Mesh(), remat="block")}),
    "offload": declare(places={"cpu": Place(mesh=Mesh(), offload=("optimizer", "layers"))}),
    "sgd": declare(
        optimizer=optim.SGD(momentum=0.9, nesterov=True),
        schedule=optim.Constant(peak=0.3, steps=STEPS),
    ),
    "lion": declare(
        optimizer=optim.Lion(weight_decay=0.1), schedule=optim.Constant(peak=5e-3, steps=STEPS)
    ),
    "adafactor": declare(optimizer=optim.Adafactor(factor_above=8)),
    "lamb": declare(optimizer=optim.LAMB(), schedule=optim.Constant(peak=0.15, steps=STEPS)),
    "muon": declare(optimizer=optim.Muon(weight_decay=0.1)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("variants") / "runs"


def train(runs, name, declared):
    declared = dataclasses.replace(declared, name=name.replace(" ", "_"))
    trained = run.train(declared, workdir=runs)
    return trained, losses(runs / declared.name)


def refused_here(runs, name):
    """Whether XLA does not compile float16 for this processor; then asserts that training is
    refused with one sentence."""
    if name != "fp16" or hardware.compiles("float16"):
        return False
    with pytest.raises(UserError, match=r"precision\.compute='float16'"):
        train(runs, name, VARIANTS[name])
    return True


# Without --slow, only the variants whose arithmetic or state differs most.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for QUICK in [("batch ramp", "mixture", "fp16")]
        for name in VARIANTS
    ],
)
def test_the_loss_decreases(runs, name):
    if refused_here(runs, name):
        return
    trained, found = train(runs, name, VARIANTS[name])
    assert trained.step == STEPS == len(found)
    assert found[0] == pytest.approx(5.77, abs=0.15)  # ln 320, the loss of uniform predictions
    assert sum(found[-3:]) / 3 < found[0] - 0.5


def lines(runs, name):
    return [json.loads(x) for x in (runs / name / "metrics.jsonl").read_text().splitlines()]


def test_a_batch_ramp_logs_its_token_counts(runs):
    train(runs, "batch ramp", VARIANTS["batch ramp"])
    counted = [line["tokens"] for line in lines(runs, "batch_ramp")]
    assert counted == [64 * step if step <= 6 else 384 + 128 * (step - 6) for step in range(1, 13)]


def test_fp16_loss_scaling_skips_no_step_at_the_end(runs):
    if refused_here(runs, "fp16"):
        return
    train(runs, "fp16", VARIANTS["fp16"])
    scales = [line["loss_scale"] for line in lines(runs, "fp16")]
    assert all(scale >= 1 for scale in scales)
    assert lines(runs, "fp16")[-1]["skipped"] == 0


@pytest.mark.slow
def test_gradient_accumulation_equals_the_whole_batch(runs):
    """The order of sums differs; in float32 losses agree to 1e-5 over a dozen steps."""
    _, whole = train(runs, "whole", declare())
    parts = declare(places={"cpu": Place(mesh=Mesh(), microbatches=2)})
    _, halves = train(runs, "halves", parts)
    assert halves == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_a_run_may_resume_at_another_place(runs, monkeypatch):
    """The place is not part of a run's identity: this run stops at one and finishes at another."""
    _, whole = train(runs, "whole", declare())
    first = dataclasses.replace(declare(), name="moved", save=dataclasses.replace(SAVE, every=6))

    class Enough(Exception):
        pass

    prefetch = data.prefetch

    def until_seven(function, start, stop):
        def at_step(step):
            if step == 7:
                raise Enough
            return function(step)

        return prefetch(at_step, start, stop)

    monkeypatch.setattr(data, "prefetch", until_seven)
    with pytest.raises(Enough):
        run.train(first, workdir=runs)
    monkeypatch.undo()
    away = ("optimizer", "layers")
    elsewhere = {"other": Place(mesh=Mesh(), microbatches=2, remat="block", offload=away)}
    run.train(dataclasses.replace(first, places=elsewhere), workdir=runs)
    moved = losses(runs / "moved")
    assert moved[:6] == whole[:6]
    assert moved == pytest.approx(whole, rel=1e-5)
