"""Compares ours in float32 with what smollm2.py recorded in OUT, on the CPU; prints a table.

    python tests/oracles/smollm2.py FOLDER OUT
    PYTHONPATH=tests:tests/objectives python tests/oracles/check_smollm2.py OUT

XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= leaves out a library of XLA that is less exact.
Errors are relative: of the loss, of the gradient of three weights (largest error over largest
entry), and of the norms of all weights' gradients (the median and the largest).
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
import test_trl as ours

import lm
from lm import model
from lm.objectives import NextToken
from lm.objectives.token_losses import token_logps

Recorded = dict[str, np.ndarray]


def main() -> None:
    """Prints a line for each objective."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    policy, reference = lm.load(out / "policy"), lm.load(out / "reference")

    def read(name: str) -> Recorded:
        with np.load(out / f"{name}.npz") as arrays:
            return dict(arrays)

    print("                 loss      gradients                   norms: median   largest")
    check_sft(read("sft"), policy)
    check_preference(read("preference") | read("unpaired") | read("simpo"), policy, reference)
    check_reward(read("reward"), lm.load(out / "reward"))
    check_distill(read("distill"), policy, lm.load(out / "teacher"))


def report(recorded: Recorded, name: str, run: Any, objective: Any, batch: Any, frozen: Any):
    """Evaluates an objective and prints its errors."""
    results = ours.evaluate({name: objective}, run.experiment.model, run.params, batch, frozen)
    loss, _, grads = results[name]
    want = recorded[f"{name}/loss"]
    parts = [f"{name:16} {abs(loss / want - 1):.1e} "]
    for key, grad in recorded.items():
        if key.startswith(f"{name}/grad/"):
            got = grads[key.removeprefix(f"{name}/grad/")]
            parts.append(f"{np.abs(got - grad).max() / np.abs(grad).max():.1e}")
    norms = np.array([np.linalg.norm(grads[weight].astype(float)) for weight in sorted(grads)])
    errors = np.abs(norms / recorded[f"{name}/norms"] - 1)
    print(*parts, f"  {np.median(errors):.1e} {errors.max():.1e}", flush=True)


def check_sft(recorded: Recorded, run: Any) -> None:
    """The loss on the assistant's messages, and the log-probability of every token."""
    each = ours.documents(recorded, "batch", recorded["batch/labels"] != -100)
    batch = ours.pack(each, per_row=3)
    report(recorded, "sft", run, NextToken(), batch, {})

    @jax.jit
    def log_probs(params, batch):
        apply = model.Model(run.experiment.model, params)
        output = apply(batch.tokens, segments_bt=batch.segments, positions_bt=batch.positions)
        return token_logps(apply, output.hidden_btd, batch.targets)

    computed, worst = np.asarray(log_probs(run.params, batch)), 0.0
    for i, (ids, _) in enumerate(each):
        row, segment = divmod(i, 3)
        got = computed[row][batch.segments[row] == segment + 1][:-1]
        want = recorded["sft/log_probs"][i, : len(ids) - 1]
        worst = max(worst, np.abs(got - want).max() / np.abs(want).max())
    print(f"log-probabilities of tokens: {worst:.1e}", flush=True)


def check_preference(recorded: Recorded, policy: Any, reference: Any) -> None:
    """DPO, IPO, SimPO and KTO."""
    frozen = {"reference": reference.params}
    for name, objective in ours.PAIRED.items():
        if f"{name}/loss" in recorded:
            models = frozen if objective.models() else {}
            report(recorded, name, policy, objective, ours.pairs(recorded), models)
    batch = ours.feedback(recorded)
    for name, objective in ours.UNPAIRED.items():
        report(recorded, name, policy, objective, batch, frozen)


def check_reward(recorded: Recorded, run: Any) -> None:
    """The reward model."""
    for name, objective in ours.REWARD.items():
        report(recorded, name, run, objective, ours.pairs(recorded), {})


def check_distill(recorded: Recorded, student: Any, teacher: Any) -> None:
    """Divergences from a teacher. Padding comes after all real tokens, and has no weight."""
    recorded["batch/attention_mask"] = np.ones_like(recorded["batch/input_ids"])
    each = ours.documents(recorded, "batch", recorded["batch/labels"] != -100)
    batch = ours.pack(each, per_row=3)
    for name, objective in ours.DISTILL.items():
        report(recorded, name, student, objective, batch, {"teacher": teacher.params})


if __name__ == "__main__":
    main()
