"""Random access to all tokens of one source and split, end to end, over shards that may be memory
maps."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

_OPEN = 256  # shards mapped at a time: each takes a file descriptor


class Stream:
    """Documents [begin, t1 .. tn, end] one after another; D documents.

    starts    int64 [D + 1], position at which each document begins, and the end of the last
    bytes_d   int64 [D], UTF-8 bytes of each document's text
    tokens    number of tokens
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        open_shard: Callable[[int], np.ndarray],
    ):
        """`documents` holds a [documents, 2] array of token and byte counts per shard;
        `open_shard(i)` returns the tokens of shard i."""
        counts = np.concatenate([np.empty((0, 2), np.uint32), *documents])
        self.starts = np.concatenate([[0], np.cumsum(counts[:, 0], dtype=np.int64)])
        self.bytes_d = counts[:, 1].astype(np.int64)
        self.tokens = int(self.starts[-1])
        shard_tokens = [int(shard[:, 0].sum(dtype=np.int64)) for shard in documents]
        self._shard_starts = np.concatenate([[0], np.cumsum(shard_tokens, dtype=np.int64)])
        self._shard = lru_cache(_OPEN)(open_shard)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.bytes_d)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop."""
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        base, end = self._shard_starts[shard], self._shard_starts[shard + 1]
        part = self._shard(shard)[start - base : stop - base]
        return part if stop <= end else np.concatenate([part, self.read(int(end), stop)])

    def begins(self, start: int, stop: int) -> np.ndarray:
        """Positions in start to stop at which a document begins."""
        first, last = np.searchsorted(self.starts[:-1], [start, stop])
        return self.starts[first:last]

    def document_at(self, positions: np.ndarray) -> np.ndarray:
        """Index of the document that contains each position."""
        return np.searchsorted(self.starts, positions, side="right") - 1
