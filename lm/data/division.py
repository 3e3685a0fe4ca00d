"""Which text is trained on and which is held out.

A document is held out by a digest of its text: whatever the order, and whatever else is in the
corpus, and copies of a document fall on one side. A corpus of few documents gives the end of each
instead.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from lm.data.progress import Progress
from lm.data.sources import AnySource
from lm.data.tokenizer import Sample
from lm.errors import UserError

FEW = 20  # documents: of fewer, or fewer than 1 / held_out, the ends are held out

_DIGESTS = 1 << 64
_BATCH = 1 << 22  # characters


@dataclass(frozen=True)
class Division:
    """How a source is divided, and how much it is.

    documents, bytes  in the whole source
    by         'documents', 'ends' (the last `held_out` of each document's characters), or 'nothing'
    threshold  documents whose digest lies below are held out
    """

    documents: int
    bytes: int
    by: str
    held_out: float
    threshold: int

    def divide(self, text: str) -> tuple[str, str]:
        """What is trained on, and what is held out."""
        if self.by == "ends":
            return _divide_end(text, self.held_out)
        if self.by == "documents" and _digest(text.encode()) < self.threshold:
            return "", text
        return text, ""


def survey(
    name: str, source: AnySource, sample: Sample | None, progress: Progress
) -> tuple[Division, Iterable[str]]:
    """Reads a source once: its division, and the part of its training text that was drawn into
    `sample`.

    Raises UserError if there is no text, or none to train on.
    """
    by = _way(source)
    bound = int(source.held_out * _DIGESTS)
    documents = size = most = 0
    least = _DIGESTS
    with progress(f"reading {name}", source.size()) as bar:
        for texts in in_batches(source.documents()):
            read = 0
            for text in texts:
                data = text.encode()
                digest = _digest(data)
                read += len(data)
                least, most = min(least, digest), max(most, digest)
                if sample and by == "ends":
                    sample.add(_divide_end(text, source.held_out)[0])
                elif sample and (by == "nothing" or digest >= bound):
                    sample.add(text, owner=digest)
            documents += len(texts)
            size += read
            bar.advance(read)
    if not documents:
        raise UserError(f"data: source {name!r} holds no text: all of it is empty.")
    # With few documents none may lie below the bound: then it is the one with the least digest.
    threshold = max(bound, least + 1) if by == "documents" else 0
    if most < threshold:
        raise UserError(
            f"data: source {name!r} has no two different documents to divide; set held_out=0."
        )
    division = Division(documents, size, by, source.held_out, threshold)
    return division, sample.texts(without=least if threshold > bound else None) if sample else ()


def in_batches(documents: Iterable[str], characters: int = _BATCH) -> Iterator[list[str]]:
    """Documents in lists of about so many characters, at least one document each."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _way(source: AnySource) -> str:
    if source.held_out == 0:
        return "nothing"
    enough = max(FEW, math.ceil(1 / source.held_out))
    return "documents" if sum(1 for _ in islice(source.documents(), enough)) == enough else "ends"


def _divide_end(text: str, share: float) -> tuple[str, str]:
    cut = len(text) - round(len(text) * share)
    return text[:cut], text[cut:]


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
