"""The split of a source into training text and held-out text.

A document is held out if a hash of its text lies below a threshold. This does not depend on the
order or the rest of the corpus, and copies of a document land on the same side. A corpus of few
documents holds out the end of each document instead.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from lm.data import files
from lm.data.file_sources import FileSource
from lm.data.progress import Progress
from lm.data.sources import Source
from lm.data.tokenizer_training import Sample
from lm.errors import UserError

FEW = 20  # with fewer documents than this, or than 1 / held_out, their ends are held out

_HASHES = 1 << 64
_BATCH = 1 << 22  # characters


@dataclass(frozen=True)
class Split:
    """How a source is split, and its size.

    documents, bytes  of the whole source
    by         'documents', 'ends' (the last `held_out` of each document's characters), or 'nothing'
    held_out   fraction of the source
    threshold  documents with a hash below it are held out
    """

    documents: int
    bytes: int
    by: str
    held_out: float
    threshold: int

    def split(self, text: str) -> tuple[str, str]:
        """The (training, held-out) parts of a document."""
        if self.by == "ends":
            return _split_end(text, self.held_out)
        if self.by == "documents" and _hash(text.encode()) < self.threshold:
            return "", text
        return text, ""


def scan(
    name: str, source: Source, sample: Sample | None, progress: Progress
) -> tuple[Split, Iterable[str]]:
    """Reads a source once. Returns its split, and its training text as drawn into `sample`.

    Raises UserError for a source without text, or without text to train on.
    """
    by = _split_kind(source)
    bound = int(source.held_out * _HASHES)
    documents = size = largest = 0
    smallest = _HASHES
    total = source.size()
    # Only the size of files is known beforehand, which compression makes smaller than the text.
    count_files = total is not None and isinstance(source, FileSource)
    with (
        progress(f"reading {name}", total, "B") as bar,
        files.on_read(bar.advance if count_files else None),
    ):
        for texts in in_batches(source.documents()):
            batch_size = 0
            for text in texts:
                data = text.encode()
                value = _hash(data)
                batch_size += len(data)
                smallest, largest = min(smallest, value), max(largest, value)
                if sample and by == "ends":
                    sample.add(_split_end(text, source.held_out)[0])
                elif sample and (by == "nothing" or value >= bound):
                    sample.add(source.plain_text(text), owner=value)
            documents += len(texts)
            size += batch_size
            if not count_files:
                bar.advance(batch_size)
    if not documents:
        raise UserError(f"data: source {name!r} has no text: all of its documents are empty.")
    # Among few documents none may lie below the bound; then the smallest hash is held out.
    threshold = max(bound, smallest + 1) if by == "documents" else 0
    if largest < threshold:
        raise UserError(
            f"data: source {name!r} has no two different documents to split; set held_out=0."
        )
    split = Split(documents, size, by, source.held_out, threshold)
    return split, sample.texts(without=smallest if threshold > bound else None) if sample else ()


def in_batches(documents: Iterable[str], characters: int = _BATCH) -> Iterator[list[str]]:
    """Lists of documents of about `characters` in total, at least one document each."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _split_kind(source: Source) -> str:
    if source.held_out == 0:
        return "nothing"
    if not source.splits_text:
        return "documents"
    enough = max(FEW, math.ceil(1 / source.held_out))
    return "documents" if sum(1 for _ in islice(source.documents(), enough)) == enough else "ends"


def _split_end(text: str, fraction: float) -> tuple[str, str]:
    end = len(text) - round(len(text) * fraction)
    return text[:end], text[end:]


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
