"""Data sources: declarations that read documents. `Source` is the base class, also of your own.

`documents()` yields the texts, `recipe()` identifies them, and `held_out` is the fraction of them
that is kept from training, for evaluation.
"""

import abc
import dataclasses
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lm.data import files
from lm.data.identity import class_name, code_digest, plain
from lm.data.tokenizer import Tokenizer
from lm.data.unicode import replace_surrogates
from lm.errors import UserError

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def positional() -> Any:
    """A required field that is also accepted without its name: data.Text("books/*.txt")."""
    return dataclasses.field(kw_only=False)


class Encoded(NamedTuple):
    """The tokens of a document.

    ids      int32, complete: with the begin token, and the end token where there is one
    weights  uint8, above 0 for each token that is predicted with a loss; None: 1 for all but the
             first
    bytes    UTF-8 bytes of the text that these stand for
    key      in a curriculum, documents with smaller keys come first; None: no curriculum
    """

    ids: np.ndarray
    weights: np.ndarray | None
    bytes: int
    key: float | None = None

    @property
    def losses(self) -> int:
        """Number of tokens that are predicted with a loss."""
        return len(self.ids) - 1 if self.weights is None else int(np.sum(self.weights[1:] > 0))


class Joined(NamedTuple):
    """The tokens of many documents, one after another.

    tokens   int32, those of all documents
    weights  uint8, as in Encoded; None if no document has any
    lengths  uint32 [documents, 2], the tokens and bytes of each; with keys [documents, 3], and the
             bits of the key in float32
    """

    tokens: np.ndarray
    weights: np.ndarray | None
    lengths: np.ndarray


def join(documents: Sequence[Encoded]) -> Joined:
    """Joins at least one document."""
    weights = None
    if any(each.weights is not None for each in documents):
        weights = np.concatenate([_weights(each) for each in documents])
    lengths = np.array([(len(each.ids), each.bytes) for each in documents], np.uint32)
    if any(each.key is not None for each in documents):
        keys = np.array([each.key or 0 for each in documents], np.float32)
        lengths = np.column_stack([lengths, keys.view(np.uint32)])
    return Joined(np.concatenate([each.ids for each in documents]), weights, lengths)


def _weights(document: Encoded) -> np.ndarray:
    if document.weights is not None:
        return document.weights
    return np.arange(len(document.ids)).clip(max=1).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """Base class of data sources.

    A subclass is a frozen, keyword-only dataclass that implements `read`, and `fingerprint` where
    its text can change while its fields stay the same. `held_out` is the fraction of documents
    held out for evaluation; 0 holds out none.
    """

    held_out: float = 0.05

    # Whether a document is text whose end may be held out from training.
    splits_text: ClassVar[bool] = True

    # Whether each document becomes two when it is encoded, which data.Pairs packs together.
    paired: ClassVar[bool] = False

    # Fields that only locate the content. The recipe leaves them out, since the fingerprint
    # identifies the content itself: moved files do not make prepared shards stale.
    _locations: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.held_out, int | float) and 0 <= self.held_out < 1):
            raise UserError(f"data.held_out={self.held_out!r} must be at least 0 and below 1.")

    @abc.abstractmethod
    def read(self) -> Iterator[str]:
        """Yields the texts; empty ones are allowed and skipped.

        Called several times, and in other processes: the same texts must come in the same order.
        Raise UserError for input that cannot be read.
        """

    def encode(self, documents: Sequence[str], tokenizer: Tokenizer) -> list[Encoded]:
        """The tokens of each document. Override it for a loss on some of them only, or to make
        none or several of one document."""
        begin, end = (np.array([i], np.int32) for i in (tokenizer.bos, tokenizer.eos))
        return [
            Encoded(np.concatenate([begin, ids, end]), None, len(text.encode()))
            for text, ids in zip(documents, tokenizer.encode_batch(documents), strict=True)
        ]

    def plain_text(self, document: str) -> str:
        """The text of a document that a tokenizer is trained on."""
        return document

    def fingerprint(self) -> str:
        """Identifies the content: token shards are prepared again when it changes.

        Default: a digest of the fields. It misses text that changes elsewhere, in a file, a
        database or on the network; override it there, for instance with a version or a date.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return hashlib.sha256(json.dumps(plain(fields)).encode()).hexdigest()

    def size(self) -> int | None:
        """Total bytes that `read` yields, for a progress bar; None if unknown before reading."""
        return None

    @property
    def label(self) -> str:
        """The name of the source when it is used alone, outside a Mixture."""
        return type(self).__name__.lower()

    def documents(self) -> Iterator[str]:
        """The texts that are not empty, in the order of `read`, with U+FFFD for halves of surrogate
        pairs."""
        texts = self.read()
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            raise UserError(
                f"data: {type(self).__name__}.read() must yield texts, not return "
                f"{type(texts).__name__}."
            )
        for text in texts:
            if not isinstance(text, str):
                raise UserError(
                    f"data: {type(self).__name__}.read() must yield str, not {type(text).__name__}."
                )
            if text:
                yield replace_surrogates(text)

    def recipe(self) -> dict[str, Any]:
        """What decides the texts, for JSON: the class, its fields without locations, and the
        fingerprint; for a user's class that inherits `fingerprint` also a digest of its code."""
        fields = {
            field.name: plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in self._locations
        }
        return {
            "source": class_name(type(self)),
            **fields,
            "fingerprint": self.fingerprint(),
            **code_digest(type(self), "fingerprint"),
        }


@dataclass(frozen=True, kw_only=True)
class StandardLibrary(Source):
    """The *.py files of this interpreter's standard library, without its tests: real text that is
    present on every machine."""

    @property
    def label(self) -> str:
        return "stdlib"

    def size(self) -> int | None:
        return sum(os.path.getsize(path) for path in self._paths())

    def fingerprint(self) -> str:
        root = sysconfig.get_paths()["stdlib"]
        found = [
            files.File(os.path.relpath(path, root), os.path.getsize(path), "")
            for path in self._paths()
        ]
        return f"Python {sys.version.split()[0]} {files.fingerprint(found)}"

    def read(self) -> Iterator[str]:
        for path in self._paths():
            with open(path, "rb") as file:
                try:
                    yield file.read().decode()
                except UnicodeDecodeError:
                    continue  # a few files declare another encoding

    def _paths(self) -> list[str]:
        paths = []
        for folder, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
            folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
            paths += [os.path.join(folder, name) for name in sorted(names) if name.endswith(".py")]
        return paths


@dataclass(frozen=True, kw_only=True)
class Documents(Source):
    """Texts inside the declaration itself, for tests and notebooks."""

    texts: tuple[str, ...] = positional()

    _locations = ("texts",)

    def __post_init__(self) -> None:
        super().__post_init__()
        is_list = isinstance(self.texts, tuple | list)
        if not is_list or not all(isinstance(text, str) for text in self.texts):
            raise UserError(f"data.texts={str(self.texts)[:60]!r} must be a tuple of texts.")

    def size(self) -> int | None:
        return sum(len(replace_surrogates(text).encode()) for text in self.texts)

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    def read(self) -> Iterator[str]:
        yield from self.texts


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A folder of token shards that `lm.data.prepare` has filled, with its sources, tokenizer and
    held-out split. `weights` as in Mixture."""

    path: str = positional()
    weights: dict[str, float] | tuple[tuple[int, dict[str, float]], ...] = ()
