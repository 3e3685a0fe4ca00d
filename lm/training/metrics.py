"""Numbers of a run, written as they come: metrics.jsonl and eval.jsonl always, the terminal,
TensorBoard, Weights & Biases and an XProf trace on request.

A line of metrics.jsonl is one update: `step` is the number of updates completed, from 1, which is
also the name of the checkpoint holding its result. `seconds` is its share of the wall clock,
evaluations and saves left out. A number that is not finite is null, so every line is valid JSON.
"""

import contextlib
import errno
import hashlib
import json
import math
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


class Result(Protocol):
    """An evaluation's number: 'source/measure', its value, standard error and sample size."""

    name: str
    value: float
    stderr: float | None
    count: int


class Writer(Protocol):
    """What the loop hands its numbers to. Only process 0 has writers."""

    def step(self, values: Values) -> None:
        """Called once per update, in order, with a line of metrics.jsonl."""

    def evaluation(self, step: int, results: Sequence[Result]) -> None:
        """Called with what an evaluation after `step` updates found."""

    def flush(self) -> None:
        """What was handed over is on disk when this returns: called before each checkpoint."""

    def close(self) -> None:
        """The run is over."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """What to show beside metrics.jsonl and eval.jsonl, which are always written.

    every        steps between two lines on the terminal
    tensorboard  event files in RUN/tensorboard (needs tensorboardX)
    wandb        the project on Weights & Biases (needs wandb; WANDB_MODE=offline is respected)
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
                "update 1 would trace the compiler."
            )

    def writers(
        self, folder: epath.PathLike, *, name: str, after: int, steps: int, declaration: Values
    ) -> tuple[Writer, ...]:
        """The writers of the run `name` in `folder`, which goes on after update `after` of `steps`:
        what was written of later ones is dropped. None on processes other than 0."""
        if not distributed.is_main():
            return ()
        folder = epath.Path(folder)
        writers: list[Writer] = [
            Files(folder, after=after),
            StepLines(every=self.every, after=after, steps=steps),
        ]
        if terminal.draws_bars():
            writers.append(Bar(after=after, steps=steps))
        if self.tensorboard:
            writers.append(TensorBoard(folder / "tensorboard", after=after))
        if self.wandb is not None:
            writers.append(WandB(self.wandb, name, folder, declaration))
        if self.trace is not None:
            writers.append(Trace(folder / "trace", *self.trace))
        return tuple(writers)


class JsonLines:
    """A file to which JSON objects are appended, one per line, each flushed on its own.

    A bucket cannot append: there the lines are kept and the object is written on `flush`.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self.path = epath.Path(path)
        self._lines: list[str] | None = None
        with _telling(self.path):
            if _is_remote(path):
                self._lines = [self.path.read_text()] if self.path.exists() else []
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a")

    def write(self, values: Values) -> None:
        """Appends one object."""
        line = json.dumps({key: _finite(x) for key, x in values.items()}, allow_nan=False) + "\n"
        if self._lines is not None:
            self._lines.append(line)
            return
        with _telling(self.path):
            self._file.write(line)
            self._file.flush()

    def flush(self) -> None:
        """Every line so far is in the file when this returns."""
        if self._lines is not None:
            with _telling(self.path):
                self.path.write_text("".join(self._lines))

    def close(self) -> None:
        """Flushes; no line may follow."""
        self.flush()
        if self._lines is None:
            self._file.close()


def read_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; none if there is no file.

    A last line that was torn off by a full disk or a crash is left out. Raises UserError naming any
    other line that is not a JSON object.
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
        elif number < len(lines):  # a whole line ends in a newline, so something follows it
            raise UserError(f"{path} line {number} is not a JSON object; remove or mend that line.")
    return objects


def truncate_after(path: epath.PathLike, step: int) -> None:
    """Keeps the lines whose "step" is at most `step`: those of a run that goes on from there.

    Writes aside and renames, so that the file is either the old one or the new one.
    """
    path = epath.Path(path)
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line.get("step", 0) <= step]
    aside = path.with_name(path.name + ".new")
    with _telling(path):
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.replace(path)


class Files:
    """metrics.jsonl and eval.jsonl of a run folder."""

    def __init__(self, folder: epath.PathLike, *, after: int) -> None:
        paths = [epath.Path(folder) / name for name in ("metrics.jsonl", "eval.jsonl")]
        for path in paths:
            truncate_after(path, after)
        self._metrics, self._evaluations = map(JsonLines, paths)

    def step(self, values: Values) -> None:
        """One line of metrics.jsonl."""
        self._metrics.write(values)

    def evaluation(self, step: int, results: Sequence[Result]) -> None:
        """One line of eval.jsonl per result."""
        for result in results:
            fields = ("name", "value", "stderr", "count")
            line = {field: getattr(result, field) for field in fields}
            self._evaluations.write({"step": step, **line})

    def flush(self) -> None:
        """Both files are complete."""
        self._metrics.flush()
        self._evaluations.flush()

    def close(self) -> None:
        """Closes both files."""
        self._metrics.close()
        self._evaluations.close()


class StepLines:
    """A line on the terminal for the first, the last and each `every`-th update, and per result."""

    def __init__(self, *, every: int, after: int, steps: int) -> None:
        self._every, self._first, self._steps = every, after + 1, steps
        self._began: float | None = None

    def step(self, values: Values) -> None:
        """Prints the line if it is its turn."""
        step, now = values["step"], time.monotonic()
        left = None
        if self._began is None:
            self._began = now
            # The first update waited for the compiler: its rates would only mislead.
            rates = ("tokens_per_second", "model_flops_utilization")
            values = {key: x for key, x in values.items() if key not in rates}
        else:
            done = step - self._first
            left = (now - self._began) / done * (self._steps - step)
        if step in (self._first, self._steps) or step % self._every == 0:
            terminal.note(step_line(values, self._steps, left))

    def evaluation(self, step: int, results: Sequence[Result]) -> None:
        """Prints each result."""
        for result in results:
            spread = "" if result.stderr is None else f" ± {result.stderr:.4f}"
            terminal.note(f"step {step}: {result.name} {result.value:.4f}{spread}")

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """Nothing is open."""


class Bar:
    """A progress bar of the updates, below the lines; where none can be drawn, the lines say it."""

    def __init__(self, *, after: int, steps: int) -> None:
        self._stack = contextlib.ExitStack()
        self._bar = self._stack.enter_context(terminal.progress("training", steps - after))

    def step(self, values: Values) -> None:
        """One more is done."""
        del values
        self._bar.advance(1)

    def evaluation(self, step: int, results: Sequence[Result]) -> None:
        """The bar waits."""

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._stack.close()


def step_line(values: Values, steps: int, seconds_left: float | None = None) -> str:
    """'step 120/4000  loss 3.214  1.52 bits/byte  lr 3.0e-04  grad 0.81  52k tokens/s  MFU 31 %
    2m 14s left', of those that are there."""
    width = len(str(steps))
    parts = [f"step {values['step']:{width}d}/{steps}"]
    for key, form in (
        ("loss", "loss {:.4f}"),
        ("bits_per_byte", "{:.4f} bits/byte"),
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
    """Event files, written by tensorboardX (which needs no TensorFlow)."""

    def __init__(self, folder: epath.PathLike, *, after: int) -> None:
        tensorboardx = _import("tensorboardX", "log.tensorboard=true")
        self._writer = tensorboardx.SummaryWriter(str(folder), purge_step=after + 1)

    def step(self, values: Values) -> None:
        """A scalar train/KEY for each value."""
        for key, value in values.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(f"train/{key}", value, values["step"])

    def evaluation(self, step: int, results: Sequence[Result]) -> None:
        """A scalar eval/NAME for each result."""
        for result in results:
            self._writer.add_scalar(f"eval/{result.name}", result.value, step)

    def flush(self) -> None:
        """The event file is complete."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WandB:
    """A run on Weights & Biases; its id comes from the folder, so that resuming goes on with it."""

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
        """train/KEY for each value."""
        self._log(values["step"], {f"train/{k}": v for k, v in values.items() if k != "step"})

    def evaluation(self, step: int, results: Sequence[Result]) -> None:
        """eval/NAME for each result."""
        self._log(step, {f"eval/{result.name}": result.value for result in results})

    def _log(self, step: int, values: Values) -> None:
        self._run.log({key: x for key, x in values.items() if x is not None}, step=step)

    def flush(self) -> None:
        """wandb keeps its own journal."""

    def close(self) -> None:
        """Ends the upload."""
        self._run.finish()


class Trace:
    """An XProf trace (open it with `xprof` or TensorBoard's profile page) from update `first` to
    `last`."""

    def __init__(self, folder: epath.PathLike, first: int, last: int) -> None:
        self._folder, self._first, self._last = str(folder), first, last
        self._running = False

    def step(self, values: Values) -> None:
        """Starts once the update before the first is done, while the device goes on."""
        step = values["step"]
        if not self._running and self._first - 1 <= step < self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._running and step >= self._last:
            self.close()

    def evaluation(self, step: int, results: Sequence[Result]) -> None:
        """Evaluations show in the trace by themselves."""

    def flush(self) -> None:
        """A trace is written when it ends."""

    def close(self) -> None:
        """Ends the trace, if it runs."""
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
def _telling(path: epath.Path) -> Iterator[None]:
    """Tells a file that cannot be written in a sentence."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full. Make room" if full else f"{error.strerror or error}. Mend it"
        raise UserError(
            f"{path} cannot be written: {why} and run the same command again."
        ) from error


def _is_remote(path: epath.PathLike) -> bool:
    return "://" in str(path)


def _finite(x: Any) -> Any:
    return None if isinstance(x, float) and not math.isfinite(x) else x
