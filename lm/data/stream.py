"""Random access to all tokens of one source and split, end to end, over shards that may be memory
maps."""

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import numpy as np

_OPEN = 256  # shards mapped at a time: each takes a file descriptor


class Stream:
    """Documents [begin, t1 .. tn, end] one after another; D documents.

    starts    int64 [D + 1], position at which each document begins, and the end of the last
    bytes_d   int64 [D], UTF-8 bytes of each document's text
    tokens    number of tokens
    losses_d  int64 [D], tokens of each document that are predicted with a loss
    keys_d    float32 [D], order in a curriculum (`Encoded.key`); None: there is none
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        open_shard: Callable[[int], np.ndarray],
        open_weights: Callable[[int], np.ndarray] | None = None,
    ):
        """`documents` holds the `lengths` of Joined for each shard; `open_shard(i)` returns the
        tokens of shard i, `open_weights(i)` their weights (None: 1 for all but the first of each
        document)."""
        counts = np.concatenate(documents) if documents else np.empty((0, 2), np.uint32)
        self.starts = np.concatenate([[0], np.cumsum(counts[:, 0], dtype=np.int64)])
        self.bytes_d = counts[:, 1].astype(np.int64)
        self.keys_d = counts[:, 2].copy().view(np.float32) if counts.shape[1] > 2 else None
        self.tokens = int(self.starts[-1])
        shard_tokens = [int(shard[:, 0].sum(dtype=np.int64)) for shard in documents]
        self._shard_starts = np.concatenate([[0], np.cumsum(shard_tokens, dtype=np.int64)])
        self._shard = lru_cache(_OPEN)(open_shard)
        self._weights = lru_cache(_OPEN)(open_weights) if open_weights else None

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.bytes_d)

    @property
    def has_weights(self) -> bool:
        """Whether only some tokens have a loss, as in conversations."""
        return self._weights is not None

    def select(self, documents: np.ndarray) -> "Stream":
        """A stream of these documents alone, in this order."""
        lengths = np.column_stack([np.diff(self.starts), self.bytes_d])[documents]

        def joined(read: Callable[[int, int], np.ndarray]) -> Callable[[int], np.ndarray]:
            spans = zip(self.starts[documents].tolist(), self.starts[documents + 1].tolist())
            return lambda _: np.concatenate([read(*span) for span in spans])

        weights = joined(self.weights) if self.has_weights else None
        return Stream([lengths.astype(np.uint32)], joined(self.read), weights)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop."""
        return self._read(self._shard, start, stop)

    def weights(self, start: int, stop: int) -> np.ndarray:
        """The weight of each of the tokens start to stop in the loss, uint8."""
        if self._weights is not None:
            return self._read(self._weights, start, stop)
        weights = np.ones(stop - start, np.uint8)
        weights[self.begins(start, stop) - start] = 0
        return weights

    @cached_property
    def losses_d(self) -> np.ndarray:
        if self._weights is None:
            return np.diff(self.starts) - 1
        sums = []
        for shard, (base, end) in enumerate(itertools.pairwise(self._shard_starts.tolist())):
            # A shard holds whole documents, whose first token is not predicted.
            first, last = np.searchsorted(self.starts, [base, end])
            starts, weights = self.starts[first:last] - base, self._weights(shard)
            losses = weights > 0
            sums.append(np.add.reduceat(losses, starts, dtype=np.int64) - losses[starts])
        return np.concatenate(sums)

    def _read(self, open_shard: Callable[[int], np.ndarray], start: int, stop: int) -> np.ndarray:
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        base, end = self._shard_starts[shard], self._shard_starts[shard + 1]
        part = open_shard(shard)[start - base : stop - base]
        if stop <= end:
            return part
        return np.concatenate([part, self._read(open_shard, int(end), stop)])

    @property
    def largest_token(self) -> int:
        """The largest token id."""
        shards = range(len(self._shard_starts) - 1)
        return max((int(self._shard(shard).max()) for shard in shards), default=0)

    def begins(self, start: int, stop: int) -> np.ndarray:
        """Positions in start to stop at which a document begins."""
        first, last = np.searchsorted(self.starts[:-1], [start, stop])
        return self.starts[first:last]

    def document_at(self, positions: np.ndarray) -> np.ndarray:
        """Index of the document that contains each position."""
        return np.searchsorted(self.starts, positions, side="right") - 1
