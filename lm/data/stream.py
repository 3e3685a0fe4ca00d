"""All tokens of one source and split, end to end, read by position from arrays that may lie on
disk."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

_OPEN = 256  # mapped files at a time: each costs a file descriptor


class Stream:
    """Documents [begin, t1 .. tn, end] one after another.

    starts    int64 [D + 1], where each document begins, and the end of the last
    bytes_d   int64 [D], UTF-8 bytes of each document's text
    tokens    how many there are
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        open_shard: Callable[[int], np.ndarray],
    ):
        """`documents` holds for each shard an array [documents, 2] of tokens and bytes,
        `open_shard(i)` its tokens."""
        both = np.concatenate([np.empty((0, 2), np.uint32), *documents])
        self.starts = np.concatenate([[0], np.cumsum(both[:, 0], dtype=np.int64)])
        self.bytes_d = both[:, 1].astype(np.int64)
        self.tokens = int(self.starts[-1])
        counts = [int(shard[:, 0].sum(dtype=np.int64)) for shard in documents]
        self._shard_starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._shard = lru_cache(_OPEN)(open_shard)

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.bytes_d)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop."""
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        base, end = self._shard_starts[shard], self._shard_starts[shard + 1]
        part = self._shard(shard)[start - base : stop - base]
        return part if stop <= end else np.concatenate([part, self.read(int(end), stop)])

    def begins(self, start: int, stop: int) -> np.ndarray:
        """The positions from start to stop at which a document begins."""
        first, last = np.searchsorted(self.starts[:-1], [start, stop])
        return self.starts[first:last]

    def document_at(self, positions: np.ndarray) -> np.ndarray:
        """The document that each position lies in."""
        return np.searchsorted(self.starts, positions, side="right") - 1
