"""Compares ours in float32 with what smollm2.py recorded in OUT, on the CPU; prints a table.

    python tests/oracles/smollm2.py FOLDER OUT
    PYTHONPATH=tests:tests/objectives python tests/oracles/check_smollm2.py OUT

XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= leaves out a library of XLA that is less exact.

A line for the loss of each objective, for the gradients of three weights, and for the norms of all
weights' gradients together; for SFT also one for the log-probabilities of tokens. Its columns:

    relative  largest error over the largest entry; of norms, each over itself
    absolute  largest error
    allclose  whether numpy.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import test_trl as ours

import lm
from lm import model
from lm.objectives import NextToken
from lm.objectives.token_losses import token_logps

Recorded = dict[str, np.ndarray]
LIMIT = 1e-5


def main() -> None:
    """Prints the table, and how many of its lines are within 1e-5."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    policy, reference = lm.load(out / "policy"), lm.load(out / "reference")

    def read(name: str) -> Recorded:
        with np.load(out / f"{name}.npz") as arrays:
            return dict(arrays)

    print(f"{'objective':16}{'':46}relative  absolute  allclose")
    errors = [
        *check_sft(read("sft"), policy),
        *check_preference(read("preference") | read("unpaired") | read("simpo"), policy, reference),
        *check_reward(read("reward"), lm.load(out / "reward")),
        *check_distill(read("distill"), policy, lm.load(out / "teacher")),
    ]
    within = {
        "relative": sum(error.relative <= LIMIT for error in errors),
        "absolute": sum(error.absolute <= LIMIT for error in errors),
        "allclose": sum(error.allclose for error in errors),
    }
    print(f"of {len(errors)} lines within {LIMIT:g}:", within)


class Error(NamedTuple):
    """How far ours is from what was recorded; see the columns above."""

    relative: float
    absolute: float
    allclose: bool


def compare(objective: str, what: str, got: Any, want: Any, each: bool = False) -> Error:
    """Prints a line of the table. `each`: errors relative to each entry, not to the largest."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    absolute = np.abs(got - want)
    relative = (absolute / (np.abs(want) if each else np.abs(want).max())).max()
    close = np.allclose(got, want, rtol=LIMIT, atol=LIMIT)
    error = Error(float(relative), float(absolute.max()), close)
    words = f"{relative:.1e}   {error.absolute:.1e}   {'yes' if close else 'no'}"
    print(f"{objective:16}{what:46}{words}", flush=True)
    return error


def report(
    recorded: Recorded, name: str, run: Any, objective: Any, batch: Any, frozen: Any
) -> list[Error]:
    """Evaluates an objective and prints its errors."""
    results = ours.evaluate({name: objective}, run.experiment.model, run.params, batch, frozen)
    loss, _, grads = results[name]
    errors = [compare(name, "loss", loss, recorded[f"{name}/loss"])]
    for key, want in recorded.items():
        if key.startswith(f"{name}/grad/"):
            weight = key.removeprefix(f"{name}/grad/")
            errors.append(compare(name, weight, grads[weight], want))
    norms = [np.linalg.norm(grads[weight].astype(float)) for weight in sorted(grads)]
    return [*errors, compare(name, "norms", norms, recorded[f"{name}/norms"], each=True)]


def check_sft(recorded: Recorded, run: Any) -> list[Error]:
    """The loss on the assistant's messages, and the log-probability of every token."""
    each = ours.documents(recorded, "batch", recorded["batch/labels"] != -100)
    batch = ours.pack(each, per_row=3)
    errors = report(recorded, "sft", run, NextToken(), batch, {})

    @jax.jit
    def log_probs(params, batch):
        apply = model.Model(run.experiment.model, params)
        output = apply(batch.tokens, segments_bt=batch.segments, positions_bt=batch.positions)
        return token_logps(apply, output.hidden_btd, batch.targets)

    computed, got, want = np.asarray(log_probs(run.params, batch)), [], []
    for i, (ids, _) in enumerate(each):
        row, segment = divmod(i, 3)
        got.append(computed[row][batch.segments[row] == segment + 1][:-1])
        want.append(recorded["sft/log_probs"][i, : len(ids) - 1])
    got, want = np.concatenate(got), np.concatenate(want)
    return [*errors, compare("sft", "log-probabilities of tokens", got, want)]


def check_preference(recorded: Recorded, policy: Any, reference: Any) -> list[Error]:
    """DPO, IPO, SimPO and KTO."""
    errors, frozen = [], {"reference": reference.params}
    for name, objective in ours.PAIRED.items():
        if f"{name}/loss" in recorded:
            models = frozen if objective.models() else {}
            errors += report(recorded, name, policy, objective, ours.pairs(recorded), models)
    batch = ours.feedback(recorded)
    for name, objective in ours.UNPAIRED.items():
        errors += report(recorded, name, policy, objective, batch, frozen)
    return errors


def check_reward(recorded: Recorded, run: Any) -> list[Error]:
    """The reward model."""
    batch, errors = ours.pairs(recorded), []
    for name, objective in ours.REWARD.items():
        errors += report(recorded, name, run, objective, batch, {})
    return errors


def check_distill(recorded: Recorded, student: Any, teacher: Any) -> list[Error]:
    """Divergences from a teacher. Padding comes after all real tokens, and has no weight."""
    recorded["batch/attention_mask"] = np.ones_like(recorded["batch/input_ids"])
    each = ours.documents(recorded, "batch", recorded["batch/labels"] != -100)
    batch = ours.pack(each, per_row=3)
    errors, frozen = [], {"teacher": teacher.params}
    for name, objective in ours.DISTILL.items():
        errors += report(recorded, name, student, objective, batch, frozen)
    return errors


if __name__ == "__main__":
    main()
