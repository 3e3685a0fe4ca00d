"""SentencePiece tokenizers (arXiv:1808.06226), and the base class of what declares a tokenizer.

Text is neither normalized nor stripped, so decode(encode(text)) == text, including line ends, tabs
and runs of spaces; characters outside the vocabulary are encoded as bytes. Ids: 0 padding, 1 begin,
2 end, 3 unknown.
"""

import abc
import codecs
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from lm.data.folder import Folder, digest
from lm.data.identity import class_name, code_digest, plain
from lm.data.json_files import damaged, is_id, json_object
from lm.data.unicode import replace_surrogates
from lm.errors import UserError

PAD, BOS, EOS, UNK = 0, 1, 2, 3

# Markers of the turns of a conversation, for `symbols`.
CHAT_SYMBOLS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")

_SPACE = "\u2581"  # stands for a space in SentencePiece's pieces
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
