"""How documents fill sequences of fixed length: a plan of which stretch of the token stream lies
where.

A document is stored as [begin, t1 .. tn, end]. It is predicted token by token: n + 1 predictions,
each in exactly one sequence.
"""

from dataclasses import dataclass

import numpy as np

from lm.data.batch import Batch
from lm.data.stream import Stream


@dataclass(frozen=True)
class Plan:
    """Pieces in the order of the sequences that hold them; sequence s holds pieces offsets[s] to
    offsets[s + 1].

    starts   int64 [P], where in the stream a piece begins
    lengths  int32 [P], how many tokens it reads, from start on; the successor of each is predicted
    offsets  int64 [sequences + 1]
    """

    starts: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray

    @property
    def sequences(self) -> int:
        """How many sequences the plan fills."""
        return len(self.offsets) - 1


@dataclass(frozen=True, kw_only=True)
class BestFit:
    """Documents side by side, none seeing another. A document longer than a sequence is cut, its
    pieces sharing one token so that no prediction is lost; pieces go where they leave the least
    room (best-fit decreasing; Ding et al., arXiv:2404.10830)."""

    def plan(self, stream: Stream, length: int) -> Plan:
        """The sequences of `length` tokens that hold every document of the stream."""
        predictions_d = np.diff(stream.starts) - 1
        pieces_d = -(-predictions_d // length)
        document_p = np.repeat(np.arange(len(pieces_d)), pieces_d)
        number_p = np.arange(len(document_p)) - np.repeat(np.cumsum(pieces_d) - pieces_d, pieces_d)
        starts_p = stream.starts[document_p] + number_p * length
        lengths_p = np.minimum(length, predictions_d[document_p] - number_p * length)
        sequence_p = _best_fit(lengths_p, length)
        order = np.argsort(sequence_p, kind="stable")
        counts = np.bincount(sequence_p)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return Plan(starts_p[order], lengths_p[order].astype(np.int32), offsets)


@dataclass(frozen=True, kw_only=True)
class Concatenate:
    """Windows over all documents end to end, each one segment: what comes before is seen across
    documents. The begin of a document is not predicted."""

    def plan(self, stream: Stream, length: int) -> Plan:
        """The windows of `length` tokens; the last one may be shorter."""
        starts = np.arange(0, stream.tokens - 1, length, dtype=np.int64)
        lengths = np.minimum(length, stream.tokens - 1 - starts).astype(np.int32)
        return Plan(starts, lengths, np.arange(len(starts) + 1))


def _best_fit(lengths_p: np.ndarray, room: int) -> np.ndarray:
    """The sequence of each piece, by best-fit decreasing into sequences of `room` tokens.

    Pieces of one length are placed together, as many to a sequence as fit, so the work grows with
    the number of different lengths and not with the number of pieces.
    """
    order = np.argsort(-lengths_p, kind="stable")
    sequence_p = np.empty(len(lengths_p), np.int64)
    open_by_room: dict[int, np.ndarray] = {}  # room left -> sequences
    rooms = 0  # bit r is set where open_by_room has r
    made = 0
    sizes, firsts = np.unique(-lengths_p[order], return_index=True)
    for size, pieces in zip((-sizes).tolist(), np.split(order, firsts[1:])):
        while len(pieces):
            fitting = rooms >> size
            if fitting:
                left = size + (fitting & -fitting).bit_length() - 1  # the least that is enough
                sequences = open_by_room.pop(left)
                rooms ^= 1 << left
            else:
                left = room
                sequences = np.arange(made, made - (-len(pieces) // (room // size)))
                made += len(sequences)
            each = left // size
            taken = min(len(pieces), each * len(sequences))
            sequence_p[pieces[:taken]] = np.repeat(sequences, each)[:taken]
            pieces = pieces[taken:]
            full, part = divmod(taken, each)
            rest = full + (part > 0)
            for after, group in (
                (left - each * size, sequences[:full]),
                (left - part * size, sequences[full:rest]),
                (left, sequences[rest:]),
            ):
                if after and len(group):
                    known = open_by_room.get(after)
                    open_by_room[after] = group if known is None else np.concatenate([known, group])
                    rooms |= 1 << after
    return sequence_p


def empty(sequences: int, length: int) -> Batch:
    """A batch of nothing but padding."""
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
    at = 0
    for segment, piece in enumerate(range(first, last), start=1):
        start, count = int(plan.starts[piece]), int(plan.lengths[piece])
        here = slice(at, at + count)
        tokens = stream.read(start, start + count + 1)
        batch.tokens[row, here] = tokens[:-1]
        batch.targets[row, here] = tokens[1:]
        batch.weights[row, here] = 1
        batch.segments[row, here] = segment
        batch.positions[row, here] = np.arange(count)
        # Within a document there is none; windows over several do not predict where the next
        # begins.
        begins = stream.begins(start + 1, start + count + 1)
        batch.weights[row, at + begins - start - 1] = 0
        at += count
