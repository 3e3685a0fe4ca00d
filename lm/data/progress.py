"""Interface of progress bars: `progress(description, total, unit)` is a context manager that yields
a Bar. `lm.terminal.progress` implements it."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol


class Bar(Protocol):
    """Progress of one task."""

    def advance(self, amount: int) -> None:
        """Adds `amount` to the completed part of the total."""


class Progress(Protocol):
    """Starts a bar. `total` is None where unknown; `unit` is "B" for bytes, "" for counts."""

    def __call__(
        self, description: str, total: int | None, unit: str = ""
    ) -> AbstractContextManager[Bar]: ...


@contextlib.contextmanager
def silent(description: str, total: int | None, unit: str = "") -> Iterator[Bar]:
    """A Progress without output."""
    yield _SilentBar()


class _SilentBar:
    def advance(self, amount: int) -> None:
        pass
