"""SentencePiece tokenizers (arXiv:1808.06226): a declaration that trains one, and the lossless
tokenizer itself.

Text is neither normalized nor stripped, so decode(encode(text)) == text, including line ends, tabs
and runs of spaces; characters outside the vocabulary are encoded as bytes. Ids: 0 padding, 1 begin,
2 end, 3 unknown.
"""

import abc
import codecs
import io
import itertools
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from lm import terminal
from lm.data.folder import Folder, digest
from lm.data.identity import class_name, code_digest, plain
from lm.data.json_files import damaged, is_id, json_object
from lm.data.unicode import replace_surrogates
from lm.errors import UserError, check_name, check_positive, check_seed

KINDS = ("bpe", "unigram", "char")
PAD, BOS, EOS, UNK = 0, 1, 2, 3

# Markers of the turns of a conversation, for `symbols`.
CHAT_SYMBOLS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")

_SPACE = "\u2581"  # stands for a space in SentencePiece's pieces
# Training threads. The number changes the result: unigram training sums in thread order.
_THREADS = 2
_UNKNOWN = "\u2585"  # reserved by SentencePiece, which leaves out training text that contains it
_CONTROLS = ("<pad>", "<s>", "</s>", "<unk>")
_NOT_IN_SYMBOLS = {" ", "\0", _SPACE, _UNKNOWN}
_SENTENCE = 4_000  # characters per training sentence
_CUT = 16_000  # characters per encoder call, about: many parts are encoded on all cores


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(abc.ABC):
    """Base class of tokenizer declarations. A subclass is a frozen dataclass that implements
    `build`, and `recipe` where its result depends on more than its fields."""

    # Not fields here: a subclass that trains declares them as fields.
    sample_bytes = 0  # training text that `build` needs; 0: none
    seed = 0  # draws that text

    @abc.abstractmethod
    def build(self, texts: Iterable[str]) -> "Tokenizer":
        """The tokenizer: loaded, or trained on `texts`, parts of at most a few thousand characters
        each."""

    def recipe(self) -> dict[str, Any]:
        """What decides the tokenizer, for JSON: the class and its fields."""
        fields = {name: plain(value) for name, value in vars(self).items()}
        return {
            "tokenizer": class_name(type(self)),
            **fields,
            **code_digest(type(self), "recipe"),
        }


@dataclass(frozen=True, kw_only=True)
class SentencePiece(TokenizerConfig):
    """Trains a tokenizer on the training documents.

    vocab          number of ids
    kind           'bpe', 'unigram' or 'char'
    byte_fallback  encode characters outside the vocabulary as bytes instead of unknown
    split_digits   one piece per digit
    split_scripts  keep letters and punctuation in different pieces. Without it text takes fewer
                   tokens (by 8 % on Python source, 2 to 11 % on prose, at 4,096 pieces)
    coverage       fraction of characters with a piece of their own
    symbols        strings that are always one piece, such as CHAT_SYMBOLS
    sample_bytes   training text at most
    seed           draws that text
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
        check_seed(**{"tokenizer.seed": self.seed})
        check_name("tokenizer.kind", self.kind, KINDS)
        if not 0.98 <= self.coverage <= 1:  # SentencePiece takes no other
            raise UserError(
                f"tokenizer.coverage={self.coverage!r} must be between 0.98 and 1; rarer characters "
                "become bytes."
            )
        fixed = 4 + 256 * self.byte_fallback + len(self.symbols)
        if type(self.vocab) is not int or self.vocab >= 2**31:
            raise UserError(f"tokenizer.vocab={self.vocab!r} must be a whole number below 2**31.")
        if self.vocab <= fixed:
            raise UserError(
                f"tokenizer.vocab={self.vocab} must be above {fixed}, the number of fixed pieces "
                "(4 controls, 256 bytes with byte_fallback, the symbols)."
            )
        if "" in self.symbols or len(set(self.symbols)) < len(self.symbols):
            raise UserError(f"tokenizer.symbols={self.symbols!r} must be different and not empty.")
        for symbol in self.symbols:
            if symbol in _CONTROLS or re.fullmatch("<0x[0-9A-F]{2}>", symbol):
                raise UserError(
                    f"tokenizer.symbols has {symbol!r}, which SentencePiece uses itself; choose "
                    "another spelling."
                )
            if set(symbol) & _NOT_IN_SYMBOLS or symbol != replace_surrogates(symbol):
                raise UserError(
                    f"tokenizer.symbols has {symbol!r}; a symbol must not contain spaces, U+2581, "
                    "U+2585, NUL or half a surrogate pair."
                )
        for a, b in itertools.product(self.symbols, repeat=2):
            if any(a.endswith(b[:size]) for size in range(1, min(len(a), len(b)))):
                raise UserError(
                    f"tokenizer.symbols has {a!r}, whose end may begin {b!r}; choose spellings "
                    "that cannot overlap in a text."
                )

    def build(self, texts: Iterable[str]) -> "Tokenizer":
        return self.train_on(texts)

    def train(self, documents: Iterable[str]) -> "Tokenizer":
        """Trains on a sample of these documents. The same documents give the same bytes."""
        sample = Sample(self.sample_bytes, self.seed)
        for document in documents:
            sample.add(document)
        return self.train_on(sample.texts())

    def train_on(self, texts: Iterable[str]) -> "Tokenizer":
        """Trains on all of these texts, of at most a few thousand characters each."""
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_without_reserved(texts),
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
            raise UserError(_training_error(self, str(error))) from None
        trained = model.getvalue()
        tokenizer = Tokenizer(_exact(trained) if self.kind == "unigram" else trained)
        self._check_symbols(tokenizer)
        if tokenizer.vocab < self.vocab and self.kind != "char":
            terminal.note(
                f"The text yields only {tokenizer.vocab} of tokenizer.vocab={self.vocab} pieces; "
                "the other ids stay unused."
            )
        return tokenizer

    def _check_symbols(self, tokenizer: "Tokenizer") -> None:
        """Raises UserError for a symbol that is not one piece of its own in every text."""
        for symbol in self.symbols:
            first, *_, last = tokenizer.encode(f"{symbol}a{symbol}")
            if first != last or first <= UNK or tokenizer.decode([first]) != symbol:
                raise UserError(
                    f"tokenizer.symbols has {symbol!r}, which the trained tokenizer does not keep "
                    "as one piece; choose another spelling."
                )


class Tokenizer:
    """A loaded SentencePiece model.

    vocab        number of ids
    pad, bos, eos, unk  ids. An imported model without padding or begin has its end id there
    prefix       ids before a prompt
    stops        ids that end a generated text
    adds_space   whether a space is added before every text, as some imported models do
    symbols      texts that are one piece wherever they stand, such as markers of turns
    name, model  name and bytes of the model file
    extra_files  further files of an imported model, by name: special tokens, chat template
    """

    name = "tokenizer.model"

    def __init__(
        self,
        model: bytes,
        path: str = "tokenizer.model",
        extra_files: Mapping[str, bytes] | None = None,
    ):
        self.model = model
        self.extra_files = dict(extra_files or {})
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
            raise UserError(f"{path} has neither a begin nor an end piece to separate documents.")
        begins = self._read_extra("tokenizer_config.json").get("add_bos_token", True)
        ends = ids_of(self._read_extra("generation_config.json").get("eos_token_id"))
        self.prefix = (self.bos,) if begins else ()
        self.stops = tuple(dict.fromkeys([self.eos, *ends]))
        self._check_specials()
        self._bytes = [self._bytes_of(piece) for piece in range(self.vocab)]
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        if proto.trainer_spec.treat_whitespace_as_suffix or proto.trainer_spec.model_type == 3:
            raise UserError(
                f"{path} is a SentencePiece model of words, or with spaces at their ends; bpe, "
                "unigram and char models with spaces at the beginning are supported."
            )
        # An imported model may add a space before every text, which decoding removes, or remove
        # spaces. Then texts must not be cut.
        self.adds_space = proto.normalizer_spec.add_dummy_prefix
        self._is_whole = self.adds_space or proto.normalizer_spec.remove_extra_whitespaces
        # SentencePiece decodes U+2581 as a space; one in the text itself is encoded as bytes.
        space_bytes = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._escapes = all(self._sp.is_byte(piece) for piece in space_bytes)
        self._escape_ids = np.array(space_bytes, np.int32)
        self.symbols = _symbols_of(proto)
        longest_first = map(re.escape, sorted(self.symbols, key=len, reverse=True))
        self._symbol = re.compile(f"({'|'.join(longest_first)})") if self.symbols else None
        # Whether every piece with a space begins with it. Then no piece spans the boundary before
        # the first space of a run, and text may be cut there.
        self._cuts_at_spaces = not any(
            _SPACE in self.piece(i).lstrip(_SPACE) for i in range(self.vocab)
        )

    @property
    def files(self) -> dict[str, bytes]:
        """All files that `lm.data.load_tokenizer` needs, by name."""
        return {self.name: self.model, **self.extra_files}

    @property
    def checksum(self) -> str:
        """A digest of the files."""
        if not self.extra_files:
            return digest(self.model)
        return digest("".join(n + digest(d) for n, d in sorted(self.files.items())).encode())

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of a conversation; None if the files have none."""
        if (content := self.extra_files.get("chat_template.jinja")) is not None:
            try:
                return content.decode()
            except UnicodeDecodeError:
                raise damaged("chat_template.jinja", "it is not UTF-8") from None
        template = self._read_extra("tokenizer_config.json").get("chat_template")
        if isinstance(template, list):  # several by name, as old files have them
            named = {str(each.get("name")): each for each in template if isinstance(each, dict)}
            template = named.get("default", {}).get("template")
        if not isinstance(template, str | None):
            raise damaged("tokenizer_config.json", "its chat_template is not text")
        return template

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files atomically into a folder, local or at an fsspec URL."""
        target = Folder(folder)
        for name, data in self.files.items():
            target.write(name, data)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as int32, without begin and end; on all cores. Half surrogate pairs are
        encoded as U+FFFD."""
        cuts = [self._cut(replace_surrogates(text)) for text in texts]
        flat = [part for parts in cuts for part in parts if not self._is_escaped(part)]
        encoded = iter(self._sp.EncodeAsNumpy(flat, num_threads=os.cpu_count()) if flat else ())
        return [
            np.concatenate(
                [self._escape_ids if self._is_escaped(part) else next(encoded) for part in parts]
            )
            for parts in cuts
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, without begin, end and padding. Invalid UTF-8 becomes U+FFFD."""
        text = self.decode_bytes(ids).decode(errors="replace")
        return text.removeprefix(" ") if self.adds_space else text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of these ids, which may begin or end within a character."""
        return b"".join(self._bytes[piece] for piece in ids if 0 <= piece < self.vocab)

    def piece(self, piece: int) -> str:
        """The piece of an id as in the model file: '\u2581def', '<0x0A>', '<s>'."""
        return self._sp.id_to_piece(piece)

    def stream(self) -> "StreamDecoder":
        """An incremental decoder."""
        return StreamDecoder(self)

    def _check_specials(self) -> None:
        """Raises UserError for special ids outside the vocabulary."""
        for token in (self.bos, self.eos, self.pad, *self.stops):
            if not 0 <= token < self.vocab:
                raise UserError(
                    f"The special token {token} lies outside the {self.vocab:,} ids of "
                    f"{self.name}; the files beside it are of another model."
                )

    def _read_extra(self, name: str) -> dict[str, Any]:
        """A JSON file beside the model; {} if missing."""
        return json_object(self.extra_files.get(name, b"{}"), f"{name} beside {self.name}")

    def _cut(self, text: str) -> list[str]:
        """Parts that encode to the ids of the whole text: cut around U+2581, around symbols, and at
        spaces that begin a piece."""
        if self._is_whole:
            return [text]
        parts = [text]
        if self._escapes and _SPACE in text:
            parts = re.split(f"({_SPACE})", text)
        if self._symbol is not None and len(text) > _CUT:
            parts = [piece for part in parts for piece in self._symbol.split(part)]
        if self._cuts_at_spaces:
            parts = [piece for part in parts for piece in _cut_at_spaces(part, _CUT)]
        return parts

    def _is_escaped(self, part: str) -> bool:
        return self._escapes and part == _SPACE

    def _bytes_of(self, piece: int) -> bytes:
        if self._sp.is_byte(piece):
            return bytes([int(self.piece(piece)[3:5], 16)])
        if self._sp.is_control(piece):
            return b""
        if self._sp.is_unknown(piece):
            return "\ufffd".encode()
        return self.piece(piece).replace(_SPACE, " ").encode()


def ids_of(value: Any) -> list[int]:
    """The ids in a JSON field that holds one id, a list, or null. Raises UserError for another
    value."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(map(is_id, ids)):
        raise damaged("generation_config.json", f"{value!r} is no list of token ids")
    return ids


class StreamDecoder:
    """Decodes ids incrementally: a character is returned once all of its bytes have arrived."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text completed by these ids."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """The rest: U+FFFD for an incomplete character, else an empty string."""
        return self._decoder.decode(b"", final=True)


class Sample:
    """A sample of a stream of documents, of at most `budget` bytes. It depends on the content of
    the documents and not on their order.

    Documents are cut into parts. A part is kept if its checksum lies below a threshold, which is
    halved whenever the kept parts exceed the budget.
    """

    def __init__(self, budget: int, seed: int):
        self._budget = budget
        self._seed = seed
        self._threshold = 1 << 32
        self._kept: list[tuple[int, int, int, str]] = []  # checksum, bytes, owner, text
        self._size = 0

    def add(self, document: str, owner: int = 0) -> None:
        """Adds a document. `texts` can exclude it again by the number `owner`."""
        for text in cut(document, _SENTENCE):
            data = replace_surrogates(text).encode()
            checksum = zlib.crc32(data, self._seed)
            if checksum < self._threshold:
                self._kept.append((checksum, len(data), owner, text))
                self._size += len(data)
            while self._size > self._budget:
                self._threshold //= 2
                self._kept = [part for part in self._kept if part[0] < self._threshold]
                self._size = sum(part[1] for part in self._kept)

    def texts(self, without: int | None = None) -> Iterator[str]:
        """The kept parts in order, except those of the owner `without`."""
        return (text for _, _, owner, text in self._kept if owner != without)


def cut(text: str, size: int) -> Iterator[str]:
    """Consecutive parts of at most `size` characters, cut before a line end, else before a space,
    else anywhere."""
    start = 0
    while len(text) - start > size:
        window = (start + 1, start + size + 1)
        end = text.rfind("\n", *window)
        end = text.rfind(" ", *window) if end < 0 else end
        end = start + size if end < 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


def _symbols_of(proto: sentencepiece_model_pb2.ModelProto) -> tuple[str, ...]:
    symbol = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    return tuple(each.piece for each in proto.pieces if each.type == symbol)


def _cut_at_spaces(text: str, size: int) -> Iterator[str]:
    """Consecutive parts of at least `size` characters, each cut before the first space of a run."""
    start = 0
    while (end := _FIRST_SPACE.search(text, start + size)) is not None:
        yield text[start : end.start()]
        start = end.start()
    yield text[start:]


_FIRST_SPACE = re.compile("(?<! ) ")


def _without_reserved(texts: Iterable[str]) -> Iterator[str]:
    """Texts without U+2585 and half surrogate pairs."""
    for text in texts:
        yield from filter(None, replace_surrogates(text).split(_UNKNOWN))


def _exact(model: bytes) -> bytes:
    """The unigram model with scores rounded to 64ths of a nat, whose sums are exact in float32.
    Then float32 search, here, and float64 search, by readers of tokenizer.json, find the same
    segmentation."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
        piece.score = round(64 * piece.score) / 64
    return proto.SerializeToString()


def _training_error(config: SentencePiece, message: str) -> str:
    if "sentences_.empty()" in message:
        return "There is no text to train the tokenizer on; is the corpus empty?"
    if sizes := re.search(r"(\d+) vs (\d+)", message):
        return (
            f"tokenizer.vocab={config.vocab} is too small: characters of the text and fixed pieces "
            f"need {sizes[2]}. Raise it, or lower tokenizer.coverage."
        )
    return f"tokenizer: SentencePiece could not train {config}: {message.strip()}"
