"""Terminal output: progress bars, tables, and readable numbers.

Progress goes to stderr and results to stdout, so that `> file` and `| jq` get only results. If
stderr is not a terminal (a file, a pipe, a cluster's log), a few plain lines replace a bar.
"""

import contextlib
import functools
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

PLAIN_SECONDS = 10.0  # between two plain lines, so that the log of a long run stays short
_WITH_TOTAL = "{desc:<22} {percentage:3.0f}% |{bar}| {done}/{of} [{elapsed}, {left} left]"


class Progress(Protocol):
    """What `progress` yields."""

    def advance(self, n: int = 1, seconds_left: float | None = None) -> None:
        """Adds `n` to what is done. `seconds_left` replaces the bar's own estimate."""


@contextlib.contextmanager
def progress(
    description: str, total: int | None = None, unit: str = "", *, initial: int = 0
) -> Iterator[Progress]:
    """Shows progress until the block ends: a bar on a terminal or in a notebook, plain lines on
    stderr elsewhere.

        with progress("tokenizing", total=len(files)) as bar:
            bar.advance(1)

    Args:
        total: of what is to be done; None: unknown.
        unit: "B" for bytes, which print as MB or GB; "" for counts, which print as 1.2k; "steps"
            for training steps, which print with all digits; their time left comes from `advance`.
        initial: done before, by an earlier process.
    """
    if draws_bars():
        with _bar(description, total, unit, initial) as bar:
            yield bar
    else:
        lines = _Lines(description, total, unit, initial)
        yield lines
        lines.done()


def draws_bars() -> bool:
    """Whether stderr is a terminal or a notebook."""
    return sys.stderr.isatty() or _in_notebook()


@contextlib.contextmanager
def _bar(description: str, total: int | None, unit: str, initial: int) -> Iterator[Progress]:
    from tqdm import tqdm  # not at the top: most commands draw no bar

    amount = _amount(unit)

    class Bar(tqdm):
        seconds_left: float | None = None

        @property
        def format_dict(self) -> dict[str, Any]:
            values = super().format_dict
            n, total = values["n"], values["total"] or 0
            left, new = self.seconds_left, n - values["initial"]
            if left is None and new and unit != "steps":
                left = values["elapsed"] * max(total - n, 0) / new
            return values | {
                "done": amount(n),
                "of": amount(total),
                "left": "?" if left is None else duration(left),
            }

    with Bar(
        desc=description,
        total=total,
        initial=initial,
        ncols=100 if _in_notebook() else None,
        dynamic_ncols=not _in_notebook(),
        bar_format=_WITH_TOTAL if total else "{desc:<22} {done} [{elapsed}]",
        file=sys.stderr,
    ) as bar:
        yield _Bar(bar)


def _amount(unit: str) -> Callable[[float], str]:
    return {"B": size, "steps": str}.get(unit, number)


class _Bar:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def advance(self, n: int = 1, seconds_left: float | None = None) -> None:
        self._bar.seconds_left = seconds_left
        self._bar.update(n)


class _Lines:
    """A plain line at most every PLAIN_SECONDS, and one at the end."""

    def __init__(self, description: str, total: int | None, unit: str, initial: int) -> None:
        self._description, self._total, self._amount = description, total, _amount(unit)
        self._initial = self._count = initial
        self._start = self._last = time.monotonic()

    def advance(self, n: int = 1, seconds_left: float | None = None) -> None:
        self._count += n
        now = time.monotonic()
        if now - self._last >= PLAIN_SECONDS:
            self._last = now
            left = self._seconds_left(now) if seconds_left is None else seconds_left
            self._print(f", {duration(left)} left" if self._total else "")

    def _seconds_left(self, now: float) -> float:
        new = max(self._count - self._initial, 1)
        return max((now - self._start) * ((self._total or 0) - self._count) / new, 0)

    def done(self) -> None:
        self._print(f" in {duration(time.monotonic() - self._start)}")

    def _print(self, tail: str) -> None:
        of = f" of {self._amount(self._total)}" if self._total else ""
        done = self._amount(self._count)
        print(f"{self._description}: {done}{of}{tail}", file=sys.stderr, flush=True)


def _in_notebook() -> bool:
    """Whether this runs in a Jupyter or Colab kernel. IPython in a terminal is a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def note(text: str) -> None:
    """Prints a line on stderr, above progress bars."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(text, file=sys.stderr, flush=True)
    else:
        tqdm.tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


@functools.cache
def note_once(text: str) -> None:
    """Prints a line as `note` does, but not the same one twice."""
    note(text)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns in plain text, numbers aligned right; no trailing spaces, no newline at the end."""
    cells = [[str(cell) for cell in row] for row in rows]
    lines = [list(header), *cells]
    if len({len(line) for line in lines}) > 1:
        raise ValueError("rows of a table must have the length of its header")
    widths = [max(map(len, column)) for column in zip(*lines)]
    right = [bool(rows) and all(map(_is_number, column[1:])) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def indent(text: str, columns: int = 4) -> str:
    """Indents each line of `text`; empty lines stay empty."""
    return textwrap.indent(text, " " * columns)


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.lstrip("-+")[:1].isdigit()


def number(value: float) -> str:
    """950 -> '950', 1_300_000 -> '1.3M', 2.5e9 -> '2.5B' (10^9)."""
    return _scaled(value, ("", "k", "M", "B", "T", "P"), join="")


def flops(per_second: float) -> str:
    """1.5e11 -> '150 GFLOP/s'."""
    return _scaled(per_second, ("", "k", "M", "G", "T", "P")) + "FLOP/s"


def json_text(value: Any) -> str:
    """Strict JSON, with null for numbers that are not finite."""
    return json.dumps(finite(value), allow_nan=False)


def finite(value: Any) -> Any:
    """The value with None for numbers that are not finite, at any depth."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size(nbytes: float) -> str:
    """Bytes in powers of 1000, as disks and vendors count: 1_200_000_000 -> '1.2 GB'."""
    return _scaled(nbytes, ("B", "kB", "MB", "GB", "TB", "PB"))


def _scaled(value: float, units: Sequence[str], join: str = " ") -> str:
    scaled, index = float(value), 0
    # 999.5 and above would round to '1000'.
    while abs(scaled) >= 999.5 and index < len(units) - 1:
        scaled, index = scaled / 1000, index + 1
    digits = f"{scaled:.1f}" if abs(scaled) < 100 or index == 0 else f"{scaled:.0f}"
    return f"{digits.removesuffix('.0')}{join}{units[index]}"


def duration(seconds: float) -> str:
    """0.25 -> '0.25 s', 42.3 -> '42 s', 125 -> '2m 05s', 7_384 -> '2h 03m', 2e5 -> '2d 07h'."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h {minutes:02d}m"
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}h"
