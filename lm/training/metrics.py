"""Writes metrics.jsonl, eval.jsonl and lines on the terminal; TensorBoard, Weights & Biases and an
XProf trace on request.

A line of metrics.jsonl is one update: `step` is the number of completed updates, from 1, and the
name of the checkpoint that holds its result. `seconds` is its wall-clock time without evaluations
and checkpoints. Numbers that are not finite are written as null, so that every line is valid JSON.
"""

import contextlib
import errno
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import jax
from etils import epath

from lm import terminal
from lm.errors import UserError, check_positive
from lm.parallel import distributed

Values = Mapping[str, Any]

# Keys of a line of metrics.jsonl that are not measures of the objective's own.
_COMMON = {
    *("step", "tokens", "seconds", "tokens_per_second", "model_flops_utilization"),
    *("loss", "nll", "bits_per_byte", "weight"),
    *("learning_rate", "grad_norm", "param_norm", "skipped", "loss_scale"),
}


def own_metrics(line: Values) -> list[str]:
    """Names of the objective's own metrics in a line of metrics.jsonl, such as margin and accuracy
    of pairs, and of auxiliary losses: all but the loss and what every run has."""
    return [name for name in line if name not in _COMMON]


class Result(Protocol):
    """A result of an evaluation: 'source/measure', its value, standard error and sample size."""

    name: str
    value: float
    stderr: float | None
    count: int


class Writer(Protocol):
    """Receives the numbers of the training loop. Only process 0 has writers."""

    def step(self, values: Values) -> None:
        """Called once per update, in order, with a line of metrics.jsonl."""

    def evaluation(self, step: int, results: Sequence[Result]) -> None:
        """Called with the results of an evaluation after `step` updates."""

    def flush(self) -> None:
        """Called before each checkpoint: everything received is on disk when this returns."""

    def close(self) -> None:
        """Called at the end of the run."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """Outputs besides metrics.jsonl and eval.jsonl, which are always written.

    every        steps between lines on the terminal
    tensorboard  writes event files in RUN/tensorboard (needs tensorboardX)
    wandb        project on Weights & Biases (needs wandb; respects WANDB_MODE=offline)
    trace        (first, last) update of an XProf trace in RUN/trace
    """

    every: int = 10
    tensorboard: bool = False
    wandb: str | None = None
    trace: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_positive(**{"log.every": self.every})
        if self.trace is not None and not 2 <= self.trace[0] <= self.trace[1]:
            raise UserError(
                f"log.trace={self.trace!r} must be (first, last) with 2 <= first <= last; "
                "update 1 would trace compilation."
            )

    def writers(
        self, folder: epath.PathLike, *, name: str, after: int, steps: int, declaration: Values
    ) -> tuple[Writer, ...]:
        """The writers of the run `name` in `folder`; none on processes other than 0.

        The run continues after update `after` of `steps`; lines of later updates are dropped.
        """
        if not distributed.is_main():
            return ()
        folder = epath.Path(folder)
        writers: list[Writer] = [
            Files(folder, after=after),
            Terminal(every=self.every, after=after, steps=steps),
        ]
        if self.tensorboard:
            writers.append(TensorBoard(folder / "tensorboard", after=after))
        if self.wandb is not None:
            writers.append(WandB(self.wandb, name, folder, declaration))
        if self.trace is not None:
            writers.append(Trace(folder / "trace", *self.trace))
        return tuple(writers)


class JsonLines:
    """Appends JSON objects to a file, one per line, each flushed.

    Buckets cannot append: there the lines are kept in memory, and `flush` writes them all.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self.path = epath.Path(path)
        self._lines: list[str] | None = None
        with _write_errors(self.path):
            if _is_remote(path):
                self._lines = [self.path.read_text()] if self.path.exists() else []
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a")

    def write(self, values: Values) -> None:
        """Appends one object."""
        line = terminal.json_text(values) + "\n"
        if self._lines is not None:
            self._lines.append(line)
            return
        with _write_errors(self.path):
            self._file.write(line)
            self._file.flush()

    def flush(self) -> None:
        """Every line is in the file when this returns."""
        if self._lines is not None:
            with _write_errors(self.path):
                self.path.write_text("".join(self._lines))

    def close(self) -> None:
        """Flushes and closes the file."""
        self.flush()
        if self._lines is None:
            self._file.close()


def read_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; none if there is no file.

    Leaves out a last line that a crash or a full disk cut off. Raises UserError for any other line
    that is not a JSON object.
    """
    path = epath.Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    objects = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if isinstance(values, dict):
            objects.append(values)
        elif number < len(lines):  # a complete line ends in a newline, after which split adds ""
            raise UserError(f"{path} line {number} is not a JSON object; remove or fix that line.")
    return objects


def truncate_after(path: epath.PathLike, step: int) -> None:
    """Drops lines whose "step" is above `step`, from which the run resumes.

    Writes a new file and renames it, so that the file is either the old one or the new one.
    """
    path = epath.Path(path)
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line.get("step", 0) <= step]
    aside = path.with_name(path.name + ".new")
    with _write_errors(path):
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.replace(path)


class Files:
    """Writes metrics.jsonl and eval.jsonl of a run folder."""

    def __init__(self, folder: epath.PathLike, *, after: int) -> None:
        paths = [epath.Path(folder) / name for name in ("metrics.jsonl", "eval.jsonl")]
        for path in paths:
            # A run that begins again keeps no line, not even an evaluation at step 0.
            truncate_after(path, after or -1)
        self._metrics, self._evaluations = map(JsonLines, paths)

    def step(self, values: Values) -> None:
        """Writes a line of metrics.jsonl."""
        self._metrics.write(values)

    def evaluation(self, step: int, results: Sequence[Result]) -> None:
        """Writes a line of eval.jsonl per result."""
        for result in results:
            fields = ("name", "value", "stderr", "count")
            line = {field: getattr(result, field) for field in fields}
            self._evaluations.write({"step": step, **line})

    def flush(self) -> None:
        """Flushes both files."""
        self._metrics.flush()
        self._evaluations.flush()

    def close(self) -> None:
        """Closes both files."""
        self._metrics.close()
        self._evaluations.close()


class TimeLeft:
    """Seconds until the last update, from the mean time per update since the first of this process,
    which is left out because it waits for compilation."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._first: tuple[int, float] | None = None

    def after(self, step: int) -> float | None:
        """Called once per update; None after the first."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
            return None
        first, start = self._first
        return (now - start) / (step - first) * (self._steps - step)


class Terminal:
    """Lines on the terminal for the first, the last and each `every`-th update and for each result;
    below them a progress bar where one can be drawn. Both count steps of the whole run."""

    def __init__(self, *, every: int, after: int, steps: int) -> None:
        self._every, self._first, self._steps = every, after + 1, steps
        self._time_left = TimeLeft(steps)
        self._stack = contextlib.ExitStack()
        self._bar = None
        if terminal.draws_bars():
            bar = terminal.progress("training", steps, "steps", initial=after)
            self._bar = self._stack.enter_context(bar)

    def step(self, values: Values) -> None:
        """Advances the bar, and prints a line if it is due."""
        step = values["step"]
        seconds_left = self._time_left.after(step)
        if seconds_left is None:
            # The first update waited for compilation: its rates would mislead.
            rates = ("tokens_per_second", "model_flops_utilization")
            values = {key: x for key, x in values.items() if key not in rates}
        if step in (self._first, self._steps) or step % self._every == 0:
            terminal.note(step_line(values, self._steps, seconds_left))
        if self._bar is not None:
            self._bar.advance(1, seconds_left)

    def evaluation(self, step: int, results: Sequence[Result]) -> None:
        """Prints each result."""
        for result in results:
            spread = "" if result.stderr is None else f" ± {result.stderr:.4f}"
            terminal.note(f"step {step}: {result.name} {result.value:.4f}{spread}")

    def flush(self) -> None:
        """Does nothing: lines are not buffered."""

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._stack.close()


def step_line(values: Values, steps: int, seconds_left: float | None = None) -> str:
    """'step 120/4000  loss 3.214  1.52 bits/byte  lr 3.0e-04  grad 0.81  52k tokens/s  MFU 31 %
    2m 14s left', with the objective's own metrics, as in 'loss 0.5140  accuracy 0.969  margin
    0.373'; values that are missing are left out."""
    width = len(str(steps))
    parts = [f"step {values['step']:{width}d}/{steps}"]
    # The difference of two rewards is the margin, which suffices on a line.
    own = [name for name in own_metrics(values) if not name.endswith("_reward")]
    for key, form in (
        ("loss", "loss {:.4f}"),
        ("bits_per_byte", "{:.4f} bits/byte"),
        *((name, f"{name} {{:.3f}}") for name in own),
        ("learning_rate", "lr {:.2e}"),
        ("grad_norm", "grad {:.2f}"),
    ):
        if values.get(key) is not None:
            parts.append(form.format(values[key]))
    if values.get("tokens_per_second") is not None:
        parts.append(f"{terminal.number(values['tokens_per_second'])} tokens/s")
    if values.get("model_flops_utilization") is not None:
        parts.append(f"MFU {100 * values['model_flops_utilization']:.0f} %")
    if values.get("skipped"):
        parts.append("skipped: gradient not finite")
    if seconds_left is not None and values["step"] < steps:
        parts.append(f"{terminal.duration(seconds_left)} left")
    return "  ".join(parts)


class TensorBoard:
    """Writes event files with tensorboardX, which does not need TensorFlow."""

    def __init__(self, folder: epath.PathLike, *, after: int) -> None:
        tensorboardx = _import("tensorboardX", "log.tensorboard=true")
        self._writer = tensorboardx.SummaryWriter(str(folder), purge_step=after + 1)

    def step(self, values: Values) -> None:
        """Writes a scalar train/KEY for each value."""
        for key, value in values.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(f"train/{key}", value, values["step"])

    def evaluation(self, step: int, results: Sequence[Result]) -> None:
        """Writes a scalar eval/NAME for each result."""
        for result in results:
            self._writer.add_scalar(f"eval/{result.name}", result.value, step)

    def flush(self) -> None:
        """Flushes the event file."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WandB:
    """Logs to Weights & Biases. The run's id is a hash of the folder, so that a resumed run
    continues it."""

    def __init__(
        self, project: str, name: str, folder: epath.PathLike, declaration: Values
    ) -> None:
        wandb = _import("wandb", f"log.wandb={project!r}")
        folder = str(folder) if _is_remote(folder) else str(epath.Path(folder).absolute())
        self._run = wandb.init(
            project=project,
            name=name,
            id=hashlib.sha256(folder.encode()).hexdigest()[:16],
            resume="allow",
            dir=None if _is_remote(folder) else folder,
            config=dict(declaration),
        )

    def step(self, values: Values) -> None:
        """Logs train/KEY for each value."""
        self._log(values["step"], {f"train/{k}": v for k, v in values.items() if k != "step"})

    def evaluation(self, step: int, results: Sequence[Result]) -> None:
        """Logs eval/NAME for each result."""
        self._log(step, {f"eval/{result.name}": result.value for result in results})

    def _log(self, step: int, values: Values) -> None:
        self._run.log({key: x for key, x in values.items() if x is not None}, step=step)

    def flush(self) -> None:
        """Does nothing: wandb writes its own files."""

    def close(self) -> None:
        """Ends the upload."""
        self._run.finish()


class Trace:
    """Records an XProf trace of updates `first` to `last`. Open it with `xprof` or TensorBoard's
    profile page."""

    def __init__(self, folder: epath.PathLike, first: int, last: int) -> None:
        self._folder, self._first, self._last = str(folder), first, last
        self._running = False

    def step(self, values: Values) -> None:
        """Starts when the update before the first is done; the device already runs the first."""
        step = values["step"]
        if not self._running and self._first - 1 <= step < self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._running and step >= self._last:
            self.close()

    def evaluation(self, step: int, results: Sequence[Result]) -> None:
        """Does nothing: the trace contains evaluations."""

    def flush(self) -> None:
        """Does nothing: a trace is written when it ends."""

    def close(self) -> None:
        """Ends the trace if it is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def _import(module: str, field: str) -> ModuleType:
    try:
        return __import__(module)
    except ImportError:
        raise UserError(
            f"{field} needs {module}, which is not installed: pip install {module}"
        ) from None


@contextlib.contextmanager
def _write_errors(path: epath.Path) -> Iterator[None]:
    """Re-raises an OSError of writing `path` as a UserError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full. Free space" if full else f"{error.strerror or error}. Fix that"
        raise UserError(
            f"{path} cannot be written: {why} and run the same command again."
        ) from error


def _is_remote(path: epath.PathLike) -> bool:
    return "://" in str(path)
