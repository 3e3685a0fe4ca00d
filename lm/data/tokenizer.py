"""SentencePiece (arXiv:1808.06226): a declaration to train one, and the trained tokenizer, which
loses nothing.

Text is neither normalised nor stripped, so decode(encode(text)) == text, line ends, tabs and runs
of spaces included; characters without a piece of their own are spelt in bytes. Ids: 0 padding, 1
begin, 2 end, 3 unknown.
"""

import codecs
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sentencepiece

from lm.data.folder import Folder, digest
from lm.errors import UserError, check_name, check_positive

log = logging.getLogger(__name__)

KINDS = ("bpe", "unigram", "char")
PAD, BOS, EOS, UNK = 0, 1, 2, 3

# One possible set of marks around the turns of a conversation, for `symbols`.
CHAT_SYMBOLS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")

_SPACE = "\u2581"  # how SentencePiece writes a space
_THREADS = 2  # of training: part of the recipe, since unigram training sums in order of threads
_SENTENCE = 4_000  # characters of text that the trainer sees as one sentence
_CUT = 16_000  # characters encoded as one: longer texts cost more time per character


@dataclass(frozen=True, kw_only=True)
class SentencePiece:
    """A tokenizer to train on the training documents.

    `coverage` is the share of characters that get a piece of their own; the rest is spelt in bytes
    (`byte_fallback`) or unknown. `symbols` are pieces that text always yields whole, as
    CHAT_SYMBOLS. `split_scripts` keeps letters and punctuation in different pieces; without it text
    takes fewer tokens (by 8 % on Python source, 2 to 11 % on prose, at 4,096 pieces). At most
    `sample_bytes` of text, drawn by `seed`, are trained on.
    """

    vocab: int
    kind: str = "bpe"
    byte_fallback: bool = True
    split_digits: bool = True
    split_scripts: bool = True
    coverage: float = 0.9999
    symbols: tuple[str, ...] = ()
    sample_bytes: int = 1 << 25
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(**{"tokenizer.sample_bytes": self.sample_bytes})
        check_name("tokenizer.kind", self.kind, KINDS)
        if not 0 < self.coverage <= 1:
            raise UserError(f"tokenizer.coverage={self.coverage!r} must be above 0 and at most 1.")
        fixed = 4 + 256 * self.byte_fallback + len(self.symbols)
        if self.vocab <= fixed:
            raise UserError(
                f"tokenizer.vocab={self.vocab} must be above {fixed}: the pieces that every such "
                "tokenizer holds (4 controls, 256 bytes with byte_fallback, the symbols)."
            )
        if "" in self.symbols or len(set(self.symbols)) < len(self.symbols):
            raise UserError(f"tokenizer.symbols={self.symbols!r} must be different and not empty.")

    def recipe(self) -> dict[str, Any]:
        """The declaration as JSON."""
        return {"tokenizer": "SentencePiece", **vars(self)}

    def train(self, documents: Iterable[str]) -> "Tokenizer":
        """A tokenizer trained on a sample of these documents. Same documents, same bytes."""
        sample = Sample(self.sample_bytes, self.seed)
        for document in documents:
            sample.add(document)
        return self.train_on(sample.texts())

    def train_on(self, texts: Iterable[str]) -> "Tokenizer":
        """A tokenizer trained on all of these texts, of at most a few thousand characters each."""
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type=self.kind,
                vocab_size=self.vocab,
                hard_vocab_limit=False,
                byte_fallback=self.byte_fallback,
                split_digits=self.split_digits,
                split_by_unicode_script=self.split_scripts,
                character_coverage=self.coverage,
                user_defined_symbols=list(self.symbols),
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=4 * _SENTENCE,
                pad_id=PAD,
                bos_id=BOS,
                eos_id=EOS,
                unk_id=UNK,
                pad_piece="<pad>",
                num_threads=_THREADS,
                minloglevel=3,
            )
        except RuntimeError as error:
            raise UserError(_training_refusal(self, str(error))) from None
        trained = model.getvalue()
        tokenizer = Tokenizer(_exact(trained) if self.kind == "unigram" else trained)
        if tokenizer.vocab < self.vocab and self.kind != "char":
            log.warning(
                "The text yields only %d of the %d pieces of tokenizer.vocab.",
                tokenizer.vocab,
                self.vocab,
            )
        return tokenizer


class Tokenizer:
    """A loaded SentencePiece model.

    vocab  number of ids
    pad, bos, eos, unk  ids; for a foreign model without padding or begin these are its end
    prefix  the ids that stand before a prompt; stops: those that end a text
    name, model  of the model file, and its bytes
    beside  further files of a foreign model, by name: its special tokens, its chat template
    """

    name = "tokenizer.model"

    def __init__(
        self, model: bytes, path: str = "tokenizer.model", beside: Mapping[str, bytes] | None = None
    ):
        self.model = model
        self.beside = dict(beside or {})
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError(f"{path} is not a SentencePiece model.") from None
        self.vocab = len(self._sp)
        self.eos = self._sp.eos_id() if self._sp.eos_id() >= 0 else self._sp.bos_id()
        self.bos = self._sp.bos_id() if self._sp.bos_id() >= 0 else self.eos
        self.pad = self._sp.pad_id() if self._sp.pad_id() >= 0 else self.eos
        self.unk = self._sp.unk_id()
        if self.eos < 0:
            raise UserError(f"{path} has neither a begin nor an end piece to part documents with.")
        begins = self._read_beside("tokenizer_config.json").get("add_bos_token", True)
        ends = ids_of(self._read_beside("generation_config.json").get("eos_token_id"))
        self.prefix = (self.bos,) if begins else ()
        self.stops = tuple(dict.fromkeys([self.eos, *ends]))
        self._bytes = [self._bytes_of(piece) for piece in range(self.vocab)]
        # A foreign model may set a space before every text: then texts must stay whole, and the
        # space is taken away again.
        self._adds_space = "".join(self._sp.encode_as_pieces("a")) == f"{_SPACE}a"
        # The mark for a space stands for a space even where the text holds the mark itself, so that
        # is spelt in bytes.
        spelt = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._marks = all(self._sp.is_byte(piece) for piece in spelt)
        self._mark_ids = np.array(spelt, np.int32)

    @property
    def files(self) -> dict[str, bytes]:
        """All that `lm.data.load_tokenizer` needs, by name."""
        return {self.name: self.model, **self.beside}

    @property
    def checksum(self) -> str:
        """Changes with any of the files."""
        if not self.beside:
            return digest(self.model)
        return digest("".join(n + digest(d) for n, d in sorted(self.files.items())).encode())

    @property
    def chat_template(self) -> str | None:
        """How a conversation is written down, in Jinja; None where the files say nothing of it."""
        if "chat_template.jinja" in self.beside:
            return self.beside["chat_template.jinja"].decode()
        return self._read_beside("tokenizer_config.json").get("chat_template")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes its files into a folder, local or at an fsspec URL; each is whole or absent."""
        place = Folder(folder)
        for name, data in self.files.items():
            place.write(name, data)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without begin and end."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as int32, without begin and end; on all cores."""
        cuts = [self._cut(text) for text in texts]
        flat = [part for parts in cuts for part in parts if not self._is_mark(part)]
        encoded = iter(self._sp.EncodeAsNumpy(flat, num_threads=os.cpu_count()) if flat else ())
        return [
            np.concatenate(
                [self._mark_ids if self._is_mark(part) else next(encoded) for part in parts]
            )
            for parts in cuts
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids. Begin, end and padding are nothing, bytes that are not UTF-8 are
        U+FFFD."""
        text = self.decode_bytes(ids).decode(errors="replace")
        return text.removeprefix(" ") if self._adds_space else text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of these ids, which may begin or end within a character."""
        return b"".join(self._bytes[piece] for piece in ids if 0 <= piece < self.vocab)

    def piece(self, piece: int) -> str:
        """How the model file writes a piece: '\u2581def', '<0x0A>', '<s>'."""
        return self._sp.id_to_piece(piece)

    def stream(self) -> "Stream":
        """Decodes ids as they come."""
        return Stream(self)

    def _read_beside(self, name: str) -> dict[str, Any]:
        """A JSON file; {} where there is none."""
        try:
            found = json.loads(self.beside.get(name, b"{}"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{name} beside {self.name} is damaged; fetch it again.")
        return found

    def _cut(self, text: str) -> list[str]:
        if self._adds_space:
            return [text]
        parts = [text]
        if self._marks and _SPACE in text:
            parts = re.split(f"({_SPACE})", text)
        return [piece for part in parts for piece in cut(part, _CUT)]

    def _is_mark(self, part: str) -> bool:
        return self._marks and part == _SPACE

    def _bytes_of(self, piece: int) -> bytes:
        if self._sp.is_byte(piece):
            return bytes([int(self.piece(piece)[3:5], 16)])
        if self._sp.is_control(piece):
            return b""
        if self._sp.is_unknown(piece):
            return "\ufffd".encode()
        return self.piece(piece).replace(_SPACE, " ").encode()


def ids_of(value: Any) -> list[int]:
    """Of a field that holds one id, several, or none."""
    return [] if value is None else value if isinstance(value, list) else [value]


class Stream:
    """Text as ids arrive: a character is given out once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """What is left at the end: U+FFFD where a character was begun, else nothing."""
        return self._decoder.decode(b"", final=True)


class Sample:
    """A bounded part of a stream of documents, drawn by the content of their parts and so whatever
    their order or number.

    Parts are kept while a digest lies below a threshold, which is halved whenever more than
    `budget` bytes are kept.
    """

    def __init__(self, budget: int, seed: int):
        self._budget = budget
        self._seed = seed
        self._threshold = 1 << 32
        self._kept: list[tuple[int, int, int, str]] = []  # digest, bytes, owner, text
        self._size = 0

    def add(self, document: str, owner: int = 0) -> None:
        """Offers a document; `owner` is a number by which `texts` can leave it out again."""
        for text in cut(document, _SENTENCE):
            data = text.encode()
            digest = zlib.crc32(data, self._seed)
            if digest < self._threshold:
                self._kept.append((digest, len(data), owner, text))
                self._size += len(data)
            while self._size > self._budget:
                self._threshold //= 2
                self._kept = [part for part in self._kept if part[0] < self._threshold]
                self._size = sum(part[1] for part in self._kept)

    def texts(self, without: int | None = None) -> Iterator[str]:
        """The parts that were kept, in order, but those of one owner."""
        return (text for _, _, owner, text in self._kept if owner != without)


def cut(text: str, size: int) -> Iterator[str]:
    """Consecutive parts of at most `size` characters, cut before a line end, or a space, or
    anywhere."""
    start = 0
    while len(text) - start > size:
        window = (start + 1, start + size + 1)
        end = text.rfind("\n", *window)
        end = text.rfind(" ", *window) if end < 0 else end
        end = start + size if end < 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


def _exact(model: bytes) -> bytes:
    """The same unigram model with scores in 64ths of a nat, whose sums float32 holds exactly. So a
    text has one likeliest cutting, whatever it is searched in: float32 here, float64 by readers of
    tokenizer.json."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
        piece.score = round(64 * piece.score) / 64
    return proto.SerializeToString()


def _training_refusal(config: SentencePiece, message: str) -> str:
    if "sentences_.empty()" in message:
        return "There is no text to train the tokenizer on; is the corpus empty?"
    if needed := re.search(r"(\d+) vs (\d+)", message):
        return (
            f"tokenizer.vocab={config.vocab} is too small: the characters of the text and the "
            f"fixed pieces are {needed[2]}. Raise it, or lower tokenizer.coverage."
        )
    return f"tokenizer: SentencePiece could not train {config}: {message.strip()}"
