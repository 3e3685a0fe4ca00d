"""A run that is interrupted and resumed gives the results of an uninterrupted run and logs each
step once."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from lm.checkpoint import Save, Store
from lm.errors import UserError
from lm.training.guard import Stopper
from lm.training.loop import PATIENCE, Rates, _line, loop
from lm.training.metrics import read_lines

CLOCK = ("seconds", "tokens_per_second", "model_flops_utilization")
SAVE = Save(every=8, keep_last=3)


def curve(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the values that depend on the clock."""
    lines = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    tiny_run.run(folder, 40, SAVE)
    return folder


def assert_same_run(folder: Path, other: Path) -> None:
    assert curve(folder) == curve(other)
    assert read_lines(folder / "eval.jsonl") == read_lines(other / "eval.jsonl")
    state, expected = (
        Store(f / "checkpoints").restore(jax.eval_shape(tiny_run.init)) for f in (folder, other)
    )
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_utilization_above_one_is_null() -> None:
    """This happens if the peak was measured while other work slowed the machine."""
    rates = tiny_run.RATES._replace(peak_flops=6.0 * 32)  # 32 tokens a second
    for seconds, utilization in ((0.5, None), (2.0, 0.5)):
        line = _line(1, {"loss": 1.0}, seconds, rates)
        assert line["model_flops_utilization"] == utilization


def test_a_loss_without_nll_has_no_bits_per_byte() -> None:
    assert "bits_per_byte" not in _line(1, {"loss": 0.69, "margin": 0.0}, 1.0, tiny_run.RATES)


def test_each_step_writes_one_line_of_metrics(uninterrupted: Path) -> None:
    lines = read_lines(uninterrupted / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 41))
    for line in lines:
        assert line["tokens"] == 32 * line["step"]
        assert line["tokens_per_second"] == pytest.approx(32 / line["seconds"])
        # 6 FLOPs per token at a peak of 1e9 FLOP/s
        utilization = line["tokens_per_second"] * 6e-9
        assert line["model_flops_utilization"] == pytest.approx(utilization)
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / np.log(2) / 2)
        assert line["skipped"] == 0
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_evaluations_run_at_their_interval_and_at_the_end(tmp_path: Path) -> None:
    tiny_run.run(tmp_path, 17, SAVE)
    lines = read_lines(tmp_path / "eval.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 15, 17]
    assert set(lines[0]) == {"step", "name", "value", "stderr", "count"}


def test_new_run_can_be_evaluated_before_its_first_update(tmp_path: Path) -> None:
    # The first two calls start at step 0, without a checkpoint; the third resumes.
    for steps in (3, 17, 20):
        if steps == 17:
            shutil.rmtree(tmp_path / "checkpoints")
        tiny_run.run(tmp_path, steps, SAVE, evaluate_first=True)
    lines = read_lines(tmp_path / "eval.jsonl")
    assert [line["step"] for line in lines] == [0, 5, 10, 15, 17, 20]
    assert lines[0]["value"] == 8.0  # loss of the initial weights


def test_saved_state_is_the_state_after_its_step(uninterrupted: Path) -> None:
    store = Store(uninterrupted / "checkpoints")
    assert store.steps() == [24, 32, 40]
    state = tiny_run.init()
    feed = tiny_run.batches(0)
    for step in range(1, 33):
        state, _ = tiny_run.update(state, next(feed))
        if step in (24, 32):
            restored = store.restore(jax.eval_shape(tiny_run.init), step)
            jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_stopped_run_resumes_bit_for_bit(uninterrupted: Path, tmp_path: Path) -> None:
    stopper = Stopper()

    def feed(start: int) -> Iterator[jax.Array]:
        for step, batch in enumerate(tiny_run.batches(start), start=start):
            if step == 20:  # while the 21st update is being prepared
                stopper.stop()
            yield batch

    outcome = tiny_run.run(tmp_path, 40, SAVE, stopper=stopper, feed=feed)
    assert outcome.stopped and outcome.step == 21
    assert Store(tmp_path / "checkpoints").latest() == 21
    assert [line["step"] for line in curve(tmp_path)] == list(range(1, 22))
    outcome = tiny_run.run(tmp_path, 40, SAVE)
    assert not outcome.stopped and outcome.step == 40
    assert_same_run(tmp_path, uninterrupted)


def test_lines_after_the_last_checkpoint_are_rewritten_on_resume(
    uninterrupted: Path, tmp_path: Path
) -> None:
    def feed(start: int) -> Iterator[jax.Array]:
        for step, batch in enumerate(tiny_run.batches(start), start=start):
            if step == 23:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        tiny_run.run(tmp_path, 40, SAVE, feed=feed)
    assert Store(tmp_path / "checkpoints").latest() == 16
    assert curve(tmp_path)[-1]["step"] > 16  # lines newer than the last checkpoint
    tiny_run.run(tmp_path, 40, SAVE)
    assert_same_run(tmp_path, uninterrupted)


def test_complete_run_is_not_changed(uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    outcome = tiny_run.run(uninterrupted, 40, SAVE)
    assert outcome.step == 40 and not outcome.stopped
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def _start(folder: Path, steps: int, every: int, seconds: float) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    program = [sys.executable, tiny_run.__file__, str(folder), str(steps), str(every), str(seconds)]
    return subprocess.Popen(
        program,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_lines(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)
    raise TimeoutError(f"{folder} did not reach {count} lines")


@pytest.mark.slow
def test_run_killed_at_random_moments_logs_every_step_once(tmp_path: Path) -> None:
    steps, every, seconds = 120, 4, 0.005  # a save is in progress most of the time
    moment = random.Random(0)
    expected = _start(tmp_path / "whole", steps, every, seconds)
    assert expected.communicate(timeout=240)[0].strip() == "complete"
    folder = tmp_path / "killed"
    for _ in range(4):
        process = _start(folder, steps, every, seconds)
        written = Store(folder / "checkpoints").latest() or 0
        _wait_for_lines(folder, min(written + moment.randint(1, 25), steps - 1))
        time.sleep(moment.uniform(0, 0.05))
        process.kill()
        process.communicate()
    process = _start(folder, steps, every, seconds)
    out, err = process.communicate(timeout=240)
    assert out.strip() == "complete", err
    assert [line["step"] for line in curve(folder)] == list(range(1, steps + 1))
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_a_checkpoint_and_reports_the_step(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = _start(tmp_path, 100_000, 1_000, 0.005)
    _wait_for_lines(tmp_path, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    step = Store(tmp_path / "checkpoints").latest()
    assert out.strip() == f"{number.name} at step {step}", err
    assert "Stopping" in err
    assert [line["step"] for line in curve(tmp_path)] == list(range(1, step + 1))


def test_second_signal_stops_immediately_and_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stopper() as stopper:
        assert not stopper.asked(1)
        signal.raise_signal(signal.SIGTERM)
        assert stopper.asked(2) and stopper.cause == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_stopper_works_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGINT)
    asked = []

    def body() -> None:
        with Stopper() as stopper:
            stopper.stop()
            asked.append(stopper.asked(1))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert asked == [True]
    assert signal.getsignal(signal.SIGINT) is before


def test_persistent_nonfinite_gradients_end_the_run_with_an_error(tmp_path: Path) -> None:
    def feed(start: int) -> Iterator[jax.Array]:
        for step, batch in enumerate(tiny_run.batches(start), start=start):
            yield batch if step < 10 else jnp.full(8, jnp.nan)

    with pytest.raises(
        UserError, match=rf"{PATIENCE} updates in a row, up to step {10 + PATIENCE},"
    ):
        tiny_run.run(tmp_path, 100, Save(every=7), feed=feed)
    lines = curve(tmp_path)
    assert lines[-1]["step"] == 10 + PATIENCE
    assert lines[-1]["loss"] is None and lines[-1]["skipped"] == 1


def test_running_out_of_batches_raises_an_error(tmp_path: Path) -> None:
    def feed(start: int) -> Iterator[jax.Array]:
        yield from [jnp.zeros(8)] * 3

    with pytest.raises(ValueError, match="ended after update 3 of 10"):
        tiny_run.run(tmp_path, 10, SAVE, feed=feed)


def test_metrics_are_fetched_while_the_next_update_runs() -> None:
    """Order of actions on the host: update n + 1 is dispatched before line n is written."""
    order: list[str] = []

    class Recorder:
        def step(self, values: Any) -> None:
            order.append(f"line {values['step']}")

        def flush(self) -> None:
            order.append("flush")

    def update(state: int, batch: int) -> tuple[int, dict[str, Any]]:
        order.append(f"update {batch + 1}")
        return state + 1, {"loss": jnp.float32(0)}

    loop(
        0,
        update,
        iter(range(10)),
        start=0,
        steps=3,
        rates=Rates(tokens_before=lambda step: step),
        writers=[Recorder()],
    )
    assert order == ["update 1", "update 2", "line 1", "update 3", "line 2", "line 3", "flush"]


STOP_ON_ONE_PROCESS = """
import sys
from lm.parallel import distributed
distributed.initialize()
import jax, jax.numpy as jnp
from lm.training.guard import Stopper
from lm.training.loop import Rates, loop

stopper = Stopper()
def batches():
    for step in range(1, 1000):
        if step == 5 and jax.process_index() == 1:
            stopper.stop()
        yield step
outcome = loop(
    0, lambda state, batch: (state + 1, {"loss": jnp.float32(0)}), batches(),
    start=0, steps=1000, rates=Rates(tokens_before=lambda step: step), stopper=stopper,
)
print(outcome.step, outcome.stopped)
"""


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_when_one_is_asked_to_stop() -> None:
    port = 30_000 + os.getpid() % 10_000
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", STOP_ON_ONE_PROCESS],
            env={
                **os.environ,
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for host in hosts:
        out, err = host.communicate(timeout=120)
        # The processes exchange stop requests at every 16th step.
        assert out.splitlines() == ["16 True"], err
