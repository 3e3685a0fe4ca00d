"""Packing of documents into sequences of fixed length.

A plan assigns chunks of the token stream to sequences. A document is stored as
[begin, t1 .. tn, end], which gives n + 1 predictions, each in exactly one sequence.
"""

import abc
import itertools
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from lm.data.batch import Batch
from lm.data.stream import Stream
from lm.errors import UserError

STAGES = 10  # of a curriculum


def _none() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class Plan:
    """C chunks in the order of their sequences; sequence s has chunks offsets[s] to offsets[s + 1].

    starts    int64 [C], position in the stream at which a chunk begins
    lengths   int32 [C], input tokens of a chunk; the successor of each is its target
    offsets   int64 [sequences + 1]
    cut       documents that are longer than a sequence and became several chunks
    left_out  documents that no sequence holds
    stages    number of sequences of each stage of a curriculum; empty: there is none
    """

    starts: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    cut: np.ndarray = field(default_factory=_none)
    left_out: np.ndarray = field(default_factory=_none)
    stages: np.ndarray = field(default_factory=_none)

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return len(self.offsets) - 1


@dataclass(frozen=True, kw_only=True)
class Packing(abc.ABC):
    """Base class of packing methods. A subclass is a frozen dataclass that implements `plan`."""

    # Whether it keeps pairs of documents together, and so is for sources of pairs alone.
    paired: ClassVar[bool] = False

    @abc.abstractmethod
    def plan(self, stream: Stream, length: int) -> Plan:
        """Packs the documents of `stream` into sequences of `length` tokens. Must be
        deterministic: a resumed run computes the plan again."""


@dataclass(frozen=True, kw_only=True)
class BestFit(Packing):
    """Whole documents side by side; attention stays within a document.

    A document longer than a sequence is cut into chunks that overlap by one token, so that no
    prediction is lost. Each chunk goes into the sequence that it leaves the least room in
    (best-fit decreasing; Ding et al., arXiv:2404.10830).
    """

    def plan(self, stream: Stream, length: int) -> Plan:
        predictions_d = np.diff(stream.starts) - 1
        chunks_d = -(-predictions_d // length)
        document_c = np.repeat(np.arange(len(chunks_d)), chunks_d)
        number_c = np.arange(len(document_c)) - np.repeat(np.cumsum(chunks_d) - chunks_d, chunks_d)
        starts_c = stream.starts[document_c] + number_c * length
        lengths_c = np.minimum(length, predictions_d[document_c] - number_c * length)
        sequence_c = _best_fit(lengths_c, length)
        order = np.argsort(sequence_c, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(sequence_c))])
        cut = np.flatnonzero(chunks_d > 1)
        return Plan(starts_c[order], lengths_c[order].astype(np.int32), offsets, cut)


@dataclass(frozen=True, kw_only=True)
class Pairs(Packing):
    """Pairs of documents, for data.Preferences and data.Feedback: documents 2i and 2i + 1 are
    neighbours in a sequence, so that its segments (1, 2), (3, 4), ... are pairs.

    A pair is never cut. One that is longer than a sequence is left out.
    """

    paired = True

    def plan(self, stream: Stream, length: int) -> Plan:
        lengths_d = np.diff(stream.starts) - 1
        lengths_p = lengths_d.reshape(-1, 2).sum(axis=1)
        pairs = np.flatnonzero(lengths_p <= length)
        sequence_p = _best_fit(lengths_p[pairs], length)
        documents = _both(pairs[np.argsort(sequence_p, kind="stable")])
        offsets = np.concatenate([[0], 2 * np.cumsum(np.bincount(sequence_p))])
        lengths = lengths_d[documents].astype(np.int32)
        left_out = _both(np.flatnonzero(lengths_p > length))
        return Plan(stream.starts[documents], lengths, offsets, left_out=left_out)


def _both(pairs: np.ndarray) -> np.ndarray:
    """The documents of pairs."""
    return (2 * pairs[:, None] + np.arange(2)).ravel()


@dataclass(frozen=True, kw_only=True)
class Concatenate(Packing):
    """Windows of `length` tokens over all documents end to end, the last one shorter. A window is
    one segment, so attention crosses documents. Begin tokens are not predicted."""

    def plan(self, stream: Stream, length: int) -> Plan:
        starts = np.arange(0, stream.tokens - 1, length, dtype=np.int64)
        lengths = np.minimum(length, stream.tokens - 1 - starts).astype(np.int32)
        return Plan(starts, lengths, np.arange(len(starts) + 1))


def make_plan(packing: Packing, stream: Stream, length: int) -> Plan:
    """The plan of all documents; in a curriculum those of STAGES equal groups of documents, by
    rising keys. Raises UserError if no sequence holds a document."""
    if stream.keys_d is None:
        plan = packing.plan(stream, length)
    else:
        plan = _staged(packing, stream, length)
    if not plan.sequences:
        raise UserError(
            f"batch.length={length} is too short: no {'pair' if packing.paired else 'document'} "
            "fits into a sequence. Raise it."
        )
    return plan


def _staged(packing: Packing, stream: Stream, length: int) -> Plan:
    order = np.argsort(stream.keys_d, kind="stable")
    ends = np.arange(STAGES + 1) * len(order) // STAGES // 2 * 2  # even, to keep pairs together
    ends[-1] = len(order)
    groups = [order[a:b] for a, b in itertools.pairwise(ends) if b > a]
    plans = [_plan_of(packing, stream, documents, length) for documents in groups]
    chunks = np.concatenate([[0], np.cumsum([len(plan.starts) for plan in plans])])
    return Plan(
        starts=np.concatenate([plan.starts for plan in plans]),
        lengths=np.concatenate([plan.lengths for plan in plans]),
        offsets=np.concatenate([[0], *(plan.offsets[1:] + n for plan, n in zip(plans, chunks))]),
        cut=np.concatenate([plan.cut for plan in plans]),
        left_out=np.concatenate([plan.left_out for plan in plans]),
        stages=np.array([plan.sequences for plan in plans]),
    )


def _plan_of(packing: Packing, stream: Stream, documents: np.ndarray, length: int) -> Plan:
    """The plan of some documents of a stream."""
    part = stream.select(documents)
    plan = packing.plan(part, length)
    place_c = part.document_at(plan.starts)
    if (plan.starts + plan.lengths >= part.starts[place_c + 1]).any():
        raise UserError(
            f"batch.packing={type(packing).__name__}() joins documents, which a curriculum orders; "
            "use data.BestFit(), or leave data.curriculum out."
        )
    starts = plan.starts - part.starts[place_c] + stream.starts[documents[place_c]]
    return replace(plan, starts=starts, cut=documents[plan.cut], left_out=documents[plan.left_out])


def _best_fit(lengths_c: np.ndarray, capacity: int) -> np.ndarray:
    """The sequence of each chunk, by best-fit decreasing into sequences of `capacity` tokens.

    Chunks of equal length are placed together, as many per sequence as fit, so the work grows with
    the number of different lengths instead of the number of chunks.
    """
    order = np.argsort(-lengths_c, kind="stable")
    sequence_c = np.empty(len(lengths_c), np.int64)
    open_by_room: dict[int, np.ndarray] = {}  # remaining room -> sequences
    rooms = 0  # bit r is set if open_by_room has r
    count = 0  # sequences opened
    sizes, firsts = np.unique(-lengths_c[order], return_index=True)
    for size, chunks in zip((-sizes).tolist(), np.split(order, firsts[1:])):
        while len(chunks):
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1  # the least sufficient room
                sequences = open_by_room.pop(room)
                rooms ^= 1 << room
            else:
                room = capacity
                sequences = np.arange(count, count - (-len(chunks) // (capacity // size)))
                count += len(sequences)
            per_sequence = room // size
            placed = min(len(chunks), per_sequence * len(sequences))
            sequence_c[chunks[:placed]] = np.repeat(sequences, per_sequence)[:placed]
            chunks = chunks[placed:]
            full, remainder = divmod(placed, per_sequence)
            used = full + (remainder > 0)
            for room_left, group in (
                (room - per_sequence * size, sequences[:full]),
                (room - remainder * size, sequences[full:used]),
                (room, sequences[used:]),
            ):
                if room_left and len(group):
                    same = open_by_room.get(room_left)
                    open_by_room[room_left] = (
                        group if same is None else np.concatenate([same, group])
                    )
                    rooms |= 1 << room_left
    return sequence_c


def empty(sequences: int, length: int) -> Batch:
    """A batch that is all padding."""
    shape = (sequences, length)
    return Batch(
        tokens=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        weights=np.zeros(shape, np.float32),
        segments=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
    )


def fill(batch: Batch, row: int, stream: Stream, plan: Plan, sequence: int) -> None:
    """Writes a sequence of the plan into a row of an empty batch."""
    first, last = plan.offsets[sequence : sequence + 2].tolist()
    offset = 0
    for segment, chunk in enumerate(range(first, last), start=1):
        start, count = int(plan.starts[chunk]), int(plan.lengths[chunk])
        columns = slice(offset, offset + count)
        tokens = stream.read(start, start + count + 1)
        batch.tokens[row, columns] = tokens[:-1]
        batch.targets[row, columns] = tokens[1:]
        batch.weights[row, columns] = stream.weights(start + 1, start + count + 1)
        batch.segments[row, columns] = segment
        batch.positions[row, columns] = np.arange(count)
        offset += count
