"""A fixed set of documents as batches for evaluation: every token is predicted once, and each
prediction has the index of its document."""

from collections.abc import Iterator, Sequence

import numpy as np

from lm.data import packing
from lm.data.batch import Batch
from lm.data.packing import BestFit, Pairs
from lm.data.sources import Source, join
from lm.data.split import in_batches
from lm.data.stream import Stream
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError


class Evaluation:
    """Iterates over (Batch, documents_bt), with documents_bt int32 [B, T]: the document index of
    each prediction, -1 on padding.

    name      of the source
    bytes_d   int64 [D], UTF-8 bytes of each document's text
    tokens_d  int64 [D], predictions in each document: its tokens and its end token

    Batches are [sequences, length]; the last one is padded. Sequences come in a fixed shuffled
    order, so that the first batches are a fair sample of all. Pairs of documents are packed by
    data.Pairs; those that are longer than a sequence are left out.
    """

    def __init__(
        self, name: str, stream: Stream, length: int, sequences: int, is_paired: bool = False
    ):
        self.name = name
        self.bytes_d = stream.bytes_d
        self.tokens_d = stream.losses_d
        self._stream = stream
        self._length = length
        self._rows = sequences
        self._plan = packing.make_plan(Pairs() if is_paired else BestFit(), stream, length)
        self._order = np.random.RandomState(0).permutation(self._plan.sequences)

    @property
    def largest_token(self) -> int:
        """The largest token id."""
        return self._stream.largest_token

    def __len__(self) -> int:
        return -(-self._plan.sequences // self._rows)

    def __iter__(self) -> Iterator[tuple[Batch, np.ndarray]]:
        return (self.batch(index) for index in range(len(self)))

    def batch(
        self, index: int, rows: slice | Sequence[int] = slice(None)
    ) -> tuple[Batch, np.ndarray]:
        """The batch of this index and its documents_bt, or only the given rows of both."""
        places = np.arange(index * self._rows, (index + 1) * self._rows)[rows]
        batch = packing.empty(len(places), self._length)
        documents_bt = np.full(batch.tokens.shape, -1, np.int32)
        for row, place in enumerate(places.tolist()):
            if place < len(self._order):
                sequence = int(self._order[place])
                packing.fill(batch, row, self._stream, self._plan, sequence)
                self._fill_documents(documents_bt[row], sequence)
        return batch, documents_bt

    def _fill_documents(self, documents_t: np.ndarray, sequence: int) -> None:
        chunks = slice(*self._plan.offsets[sequence : sequence + 2].tolist())
        documents = self._stream.document_at(self._plan.starts[chunks])
        repeated = np.repeat(documents, self._plan.lengths[chunks])
        documents_t[: len(repeated)] = repeated


def evaluation(
    source: Source, tokenizer: Tokenizer, length: int, sequences: int, name: str | None = None
) -> Evaluation:
    """All documents of a source, tokenized now and held in memory; its `held_out` is ignored.

    Raises UserError for a source without text.
    """
    encoded = [
        e for texts in in_batches(source.documents()) for e in source.encode(texts, tokenizer)
    ]
    if not encoded:
        raise UserError(f"There is no text to evaluate on in {source}.")
    tokens, weights, lengths = join(encoded)
    has_weights = weights is not None
    stream = Stream([lengths], lambda _: tokens, (lambda _: weights) if has_weights else None)
    return Evaluation(name or source.label, stream, length, sequences, source.paired)
