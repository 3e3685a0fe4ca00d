"""Training batches: batch(step) is a pure function of seed and step, on any number of hosts."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice, pairwise
from typing import TypeVar

import numpy as np

from lm import terminal
from lm.data import mixture, packing
from lm.data.batch import Batch
from lm.data.packing import BestFit, Packing, Plan
from lm.data.stream import Stream
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError, check_size
from lm.parallel import distributed

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The global batch: `sequences` of `length` tokens per step.

    packing  how documents fill sequences
    ramp     batch size warmup: ((500, 8), (1000, 16)) takes 8 sequences before step 500, 16 before
             step 1000, then `sequences`
    """

    sequences: int
    length: int
    packing: Packing = BestFit()
    ramp: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        check_size(**{"batch.sequences": self.sequences, "batch.length": self.length})
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
        """Sequences in the batch of this step."""
        return next((size for until, size in self.ramp if step < until), self.sequences)

    def sequences_before(self, step: int) -> int:
        """Sequences in all batches before this step."""
        total = 0
        for first, last, size in self._phases():
            total += max(0, min(step, last) - first) * size
        return int(total)

    def tokens_before(self, step: int) -> int:
        """Tokens in all batches before this step, padding included."""
        return self.sequences_before(step) * self.length

    def steps_for(self, tokens: float) -> int:
        """The least number of steps with at least this many tokens."""
        sequences = math.ceil(tokens / self.length)
        for first, last, size in self._phases():
            if sequences <= (last - first) * size:
                break
            sequences -= (last - first) * size
        return first + max(0, -(-sequences // size))

    def _phases(self) -> Iterator[tuple[int, float, int]]:
        """(first step, step after the last, sequences per step) of each part of the ramp."""
        first = 0
        for until, size in self.ramp:
            yield first, until, size
            first = until
        yield first, math.inf, self.sequences


class Loader:
    """Training batches from packed streams, mixed by weights."""

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
        stages = {
            name: plan.stages.tolist() if len(plan.stages) else [plan.sequences]
            for name, plan in plans.items()
        }
        self._order = mixture.order(stages, weights, shape.sequences_before, seed)

    def batch(self, step: int, rows: slice | Sequence[int] = slice(None)) -> Batch:
        """The global batch of a step as numpy arrays, or only the given rows: a host reads only the
        rows of its own devices."""
        return self.read(self.places(step, rows))

    def places(self, step: int, rows: slice | Sequence[int] = slice(None)) -> list[tuple[str, int]]:
        """(source, number in its plan) of each sequence that `batch` reads."""
        sequences = range(self._shape.sequences_at(step))
        chosen = sequences[rows] if isinstance(rows, slice) else [sequences[row] for row in rows]
        first = self._shape.sequences_before(step)
        return [self._order[first + sequence] for sequence in chosen]

    def places_before(self, step: int) -> list[tuple[str, int]]:
        """The sequences in all batches before this step, each once, in order."""
        places, every = set(), sum(self.sequences.values())
        for index in range(self._shape.sequences_before(step)):
            if len(places) == every:
                break
            places.add(self._order[index])
        return sorted(places)

    def read(self, places: Sequence[tuple[str, int]]) -> Batch:
        """These sequences as numpy arrays."""
        batch = packing.empty(len(places), self._shape.length)
        for row, (name, number) in enumerate(places):
            packing.fill(batch, row, self._streams[name], self._plans[name], number)
        return batch

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per predicted token with the weights of step 0. Bits per byte is nats per
        token divided by this and ln 2."""
        return self.bytes_per_token_at(0)

    def bytes_per_token_at(self, step: int) -> float:
        """UTF-8 bytes per predicted token with the weights of this step."""
        table = [table for start, table in self._weights if start <= step][-1]
        rate = {n: s.bytes_d.sum() / s.losses_d.sum() for n, s in self._streams.items()}
        return float(sum(table[n] * rate[n] for n in rate) / sum(table[n] for n in rate))

    @property
    def sequences(self) -> dict[str, int]:
        """Sequences per epoch of each source."""
        return {name: plan.sequences for name, plan in self._plans.items()}


def plan_source(
    name: str, stream: Stream, shape: BatchShape, tokenizer: Tokenizer, is_paired: bool
) -> Plan:
    """How the documents of a source fill sequences. Prints how many conversations are too long.

    Raises UserError for a packing that does not fit the source.
    """
    if is_paired and not shape.packing.paired:
        raise UserError(
            f"data: source {name!r} gives pairs of documents; set batch.packing=data.Pairs()."
        )
    if shape.packing.paired and not is_paired:
        raise UserError(
            f"batch.packing={type(shape.packing).__name__}() needs pairs of documents, which data "
            f"source {name!r} does not give; use data.BestFit()."
        )
    made = packing.make_plan(shape.packing, stream, shape.length)
    if stream.has_weights and distributed.is_main():
        cut = "cut into parts, of which later ones do not see what was said before"
        _note_long(name, stream, made.cut, shape.length, tokenizer, cut)
        _note_long(name, stream, made.left_out, shape.length, tokenizer, "left out", is_paired)
    return made


def _note_long(
    name: str,
    stream: Stream,
    documents: np.ndarray,
    length: int,
    tokenizer: Tokenizer,
    result: str,
    is_paired: bool = False,
) -> None:
    """Prints how many documents of a source, or pairs of them, are longer than `length` tokens."""
    if not len(documents):
        return
    size, kind = (2, "pairs") if is_paired else (1, "conversations")
    longest = int((np.diff(stream.starts)[documents] - 1).reshape(-1, size).sum(axis=1).max())
    start, stop = stream.starts[documents.min() :][:2].tolist()
    text = tokenizer.decode(stream.read(start, min(start + 24, stop)).tolist())
    terminal.note_once(
        f"{name}: {len(documents) // size:,} of {stream.documents // size:,} {kind} are longer "
        f"than batch.length={length} and {result}; the first begins {text!r}. "
        f"batch.length={longest} holds all of them."
    )


class prefetch(Iterator[T]):
    """Iterates over function(start), function(start + 1), ... before `stop`, computed in a thread
    up to `depth` steps ahead. The thread starts at once.

        with prefetch(loader.batch, 0, steps) as batches:
            for batch in batches: ...

    An exception is raised in place of its value. Leaving the block waits for the current step and
    cancels later ones.
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
        """Stops the thread."""
        self._steps = iter(())
        self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "prefetch[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, step: int) -> None:
        self._ahead.append(self._pool.submit(self._function, step))
