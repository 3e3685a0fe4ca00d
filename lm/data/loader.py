"""Batches by step: batch(step) is a pure function of seed and step, on one host or on many."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice, pairwise
from typing import TypeVar

from lm.data import mixture, packing
from lm.data.batch import Batch
from lm.data.packing import BestFit, Concatenate, Plan
from lm.data.stream import Stream
from lm.errors import UserError, check_positive

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """`sequences` of `length` tokens per step. A `ramp` begins with fewer: ((500, 8), (1000, 16))
    means 8 until step 500, 16 until step 1000, `sequences` from there."""

    sequences: int
    length: int
    packing: BestFit | Concatenate = BestFit()
    ramp: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        check_positive(**{"batch.sequences": self.sequences, "batch.length": self.length})
        rising = [(0, 0), *self.ramp]
        if any(b[0] <= a[0] or b[1] <= a[1] for a, b in pairwise(rising)):
            raise UserError(
                f"batch.ramp={self.ramp!r} must rise in steps and in sequences, "
                "as in ((500, 8), (1000, 16))."
            )
        if self.ramp and self.ramp[-1][1] >= self.sequences:
            raise UserError(
                f"batch.ramp={self.ramp!r} must stay below batch.sequences={self.sequences}."
            )

    def sequences_at(self, step: int) -> int:
        """How many sequences this step takes."""
        return next((size for until, size in self.ramp if step < until), self.sequences)

    def sequences_before(self, step: int) -> int:
        """How many sequences the steps before this one take."""
        total = 0
        for first, last, size in self._phases():
            total += max(0, min(step, last) - first) * size
        return int(total)

    def tokens_before(self, step: int) -> int:
        """How many tokens the steps before this one take, padding included."""
        return self.sequences_before(step) * self.length

    def steps_for(self, tokens: float) -> int:
        """The least number of steps that takes this many tokens."""
        wanted = math.ceil(tokens / self.length)  # sequences
        for first, last, size in self._phases():
            if wanted <= (last - first) * size:
                break
            wanted -= (last - first) * size
        return first + max(0, -(-wanted // size))

    def _phases(self) -> Iterator[tuple[int, float, int]]:
        # (first step, the step after the last, sequences per step)
        first = 0
        for until, size in self.ramp:
            yield first, until, size
            first = until
        yield first, math.inf, self.sequences


class Loader:
    """Batches for training, drawn from packed streams by the weights of a mixture."""

    def __init__(
        self,
        streams: Mapping[str, Stream],
        plans: Mapping[str, Plan],
        weights: mixture.Phases,
        shape: BatchShape,
        seed: int,
    ):
        self._streams = streams
        self._plans = plans
        self._weights = weights
        self._shape = shape
        sequences = {name: plan.sequences for name, plan in plans.items()}
        self._order = mixture.order(sequences, weights, shape.sequences_before, seed)

    def batch(self, step: int, rows: slice | Sequence[int] = slice(None)) -> Batch:
        """The batch of a step as numpy arrays, or only these rows of it: a host reads no more than
        it needs."""
        sequences = range(self._shape.sequences_at(step))
        wanted = sequences[rows] if isinstance(rows, slice) else [sequences[row] for row in rows]
        first = self._shape.sequences_before(step)
        batch = packing.empty(len(wanted), self._shape.length)
        for row, sequence in enumerate(wanted):
            name, number = self._order[first + sequence]
            packing.fill(batch, row, self._streams[name], self._plans[name], number)
        return batch

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per predicted token, by the weights at step 0; divides nats per token
        into bits per byte."""
        return self.bytes_per_token_at(0)

    def bytes_per_token_at(self, step: int) -> float:
        """The same by the weights of this step."""
        table = [table for start, table in self._weights if start <= step][-1]
        rate = {n: s.bytes_d.sum() / (s.tokens - s.documents) for n, s in self._streams.items()}
        return float(sum(table[n] * rate[n] for n in rate) / sum(table[n] for n in rate))

    @property
    def sequences(self) -> dict[str, int]:
        """How many sequences an epoch of each source has."""
        return {name: plan.sequences for name, plan in self._plans.items()}


class prefetch(Iterator[T]):
    """function(start), function(start + 1), ... up to `stop`, computed in a thread up to `depth`
    steps ahead of the consumer, from now on.

        with prefetch(loader.batch, 0, steps) as batches:
            for batch in batches: ...

    An exception is raised where its value was due. Leaving the block waits for the step in work and
    drops those after it.
    """

    def __init__(
        self, function: Callable[[int], T], start: int, stop: int | None = None, depth: int = 2
    ):
        self._function = function
        self._steps = count(start) if stop is None else iter(range(start, stop))
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: deque[Future[T]] = deque()
        for step in islice(self._steps, depth):
            self._submit(step)

    def __next__(self) -> T:
        if not self._ahead:
            raise StopIteration
        due = self._ahead.popleft()
        for step in islice(self._steps, 1):
            self._submit(step)
        return due.result()

    def close(self) -> None:
        """Ends the thread."""
        self._steps = iter(())
        self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "prefetch[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, step: int) -> None:
        self._ahead.append(self._pool.submit(self._function, step))
