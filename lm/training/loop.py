"""The loop of supervised training.

`step` is the number of completed updates, from 1. The checkpoint STEP and the line of metrics.jsonl
with that `step` belong to the state after that many updates.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from lm.errors import UserError
from lm.training.guard import Stopper
from lm.training.metrics import Result, Writer

# Loss scaling starts high and may skip a dozen steps until its scale fits.
PATIENCE = 20


class Checkpoints(Protocol):
    """Interface of lm.checkpoint.Store that the loop uses."""

    def due(self, step: int, now: float) -> bool: ...
    def save(self, step: int, state: Any, metadata: Mapping[str, Any] | None = None) -> None: ...
    def wait(self) -> None: ...
    def latest(self) -> int | None: ...


class Evaluation(NamedTuple):
    """`run(step, params)` returns results; called after every `every`-th update and the last."""

    every: int
    run: Callable[[int, Any], Sequence[Result]]


class Rates(NamedTuple):
    """Constants that convert seconds to throughput and nats per token to bits per byte; None omits
    the metric.

    tokens_before    number of tokens in all batches before a 0-based step
    flops_per_token  forward and backward FLOPs of the model
    peak_flops       FLOPs per second of all devices together
    bytes_per_token  of the training text
    """

    tokens_before: Callable[[int], int]
    flops_per_token: float | None = None
    peak_flops: float | None = None
    bytes_per_token: float | None = None


class Outcome(NamedTuple):
    """The state after `step` updates; `stopped` if it ended early on request."""

    state: Any
    step: int
    stopped: bool


def loop(
    state: Any,
    update: Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]],
    batches: Iterable[Any],
    *,
    start: int,
    steps: int,
    rates: Rates,
    evaluations: Sequence[Evaluation] = (),
    evaluate_first: bool = False,
    writers: Sequence[Writer] = (),
    store: Checkpoints | None = None,
    metadata: Mapping[str, Any] | None = None,
    stopper: Stopper | None = None,
) -> Outcome:
    """Trains from `start` completed updates to `steps`, or until `stopper` is asked to stop.

    `update(state, batch) -> (state, metrics)` may donate the state; `batches` begins with that of
    update start + 1. While the device computes an update, the host writes the metrics of the
    previous one. A checkpoint begins only after every line up to it is written, and an evaluation
    precedes the checkpoint of its step. With `evaluate_first`, a run that begins is also evaluated
    before its first update, as step 0. A run that is killed at any moment resumes from its newest
    checkpoint; later lines are dropped, so each step is logged once.

    Saves when due, at the end, and when stopped. Raises UserError after PATIENCE skipped updates in
    a row, and for a checkpoint that `store` cannot save.
    """
    journal = _Journal(writers, rates, store)
    if evaluate_first and start == 0:
        for evaluation in evaluations:
            journal.write_evaluation(0, evaluation.run(0, state.params))
        journal.resume_clock()
    step, stopped = start, False
    for step, batch in zip(range(start + 1, steps + 1), batches, strict=False):
        state, metrics = update(state, batch)  # asynchronous
        journal.write_pending()
        journal.pending = step, metrics

        last = step == steps
        stopped = not last and stopper is not None and stopper.asked(step)
        evaluating = [e for e in evaluations if last or step % e.every == 0]
        saving = store is not None and (last or stopped or store.due(step, time.monotonic()))
        if evaluating or saving:
            journal.write_pending()
            for evaluation in evaluating:
                journal.write_evaluation(step, evaluation.run(step, state.params))
            if saving:
                journal.flush()
                store.save(step, state, metadata)
            journal.resume_clock()
        if stopped:
            break

    journal.write_pending()
    journal.flush()
    if store is not None:
        store.wait()
    if step < steps and not stopped:
        raise ValueError(f"the batches ended after update {step} of {steps}")
    return Outcome(state, step, stopped)


class _Journal:
    """Converts the metrics of an update, once computed, to a line for the writers."""

    def __init__(self, writers: Sequence[Writer], rates: Rates, store: Checkpoints | None) -> None:
        self.pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._writers, self._rates, self._store = writers, rates, store
        self._skipped_in_a_row = 0
        self.resume_clock()

    def resume_clock(self) -> None:
        """Restarts the clock: time since the last update does not count for the next one."""
        self._done_at = time.perf_counter()

    def write_pending(self) -> None:
        """Waits for the pending update and writes its line."""
        if self.pending is None:
            return
        (step, on_device), self.pending = self.pending, None
        metrics = {key: float(x) for key, x in jax.device_get(dict(on_device)).items()}
        now = time.perf_counter()
        line = _line(step, metrics, now - self._done_at, self._rates)
        self._done_at = now
        for writer in self._writers:
            writer.step(line)
        self._check_finite(step, skipped=bool(metrics.get("skipped", 0)))

    def write_evaluation(self, step: int, results: Sequence[Result]) -> None:
        """Hands the results to the writers."""
        for writer in self._writers:
            writer.evaluation(step, results)

    def flush(self) -> None:
        """Writes all lines to disk."""
        for writer in self._writers:
            writer.flush()

    def _check_finite(self, step: int, skipped: bool) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row < PATIENCE:
            return
        good = None if self._store is None else self._store.latest()
        raise UserError(
            f"The gradients of {PATIENCE} updates in a row, up to step {step}, were not finite. "
            "Lower schedule.peak or optimizer.clip_norm, or use more precise arithmetic; "
            + (
                "there is no checkpoint yet."
                if good is None
                else f"the newest checkpoint is of step {good}."
            )
        )


def _line(step: int, metrics: Mapping[str, float], seconds: float, rates: Rates) -> dict[str, Any]:
    """A line of metrics.jsonl; `tokens` counts all updates so far, the rates only this one."""
    tokens = rates.tokens_before(step)
    per_second = (tokens - rates.tokens_before(step - 1)) / seconds
    line = {"step": step, **metrics}
    if rates.bytes_per_token is not None and "nll" in metrics:  # else the loss is not of tokens
        line["bits_per_byte"] = metrics["nll"] / (math.log(2) * rates.bytes_per_token)
    line |= {"tokens": tokens, "seconds": seconds, "tokens_per_second": per_second}
    if rates.flops_per_token is not None and rates.peak_flops is not None:
        utilization = per_second * rates.flops_per_token / rates.peak_flops
        # Above 1, the peak was measured while other work slowed the machine: null instead.
        line["model_flops_utilization"] = utilization if utilization <= 1 else None
    return line
