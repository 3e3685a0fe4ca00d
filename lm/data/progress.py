"""How long work says how far it is: `progress(description, total)` is a context manager whose value
has `.advance(n)`."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol


class Bar(Protocol):
    """One piece of work under way."""

    def advance(self, amount: int) -> None:
        """So much more of the total is done."""


# The total is None where it is not known before.
Progress = Callable[[str, int | None], AbstractContextManager[Bar]]


@contextlib.contextmanager
def silent(description: str, total: int | None) -> Iterator[Bar]:
    """Says nothing."""
    yield _Silent()


class _Silent:
    def advance(self, amount: int) -> None:
        pass
