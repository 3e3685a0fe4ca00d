"""tokenizer.json files, read with the `tokenizers` library: byte-level tokenizers (Llama 3, Qwen,
OLMo) and SentencePiece's (Llama 2, Gemma)."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm.data.json_files import damaged
from lm.data.tokenizer import Tokenizer, ids_of
from lm.data.unicode import replace_surrogates
from lm.errors import UserError

_SPACE = "\u2581"


class JsonTokenizer(Tokenizer):
    """A Tokenizer from a tokenizer.json and the files beside it.

    As in transformers, the spelling of a special token in a text is encoded as that token, so that
    a prompt may be a conversation (unless tokenizer_config.json has `split_special_tokens`).
    Special tokens decode to nothing.
    """

    name = "tokenizer.json"

    def __init__(
        self,
        model: bytes,
        path: str = "tokenizer.json",
        extra_files: Mapping[str, bytes] | None = None,
    ):
        import tokenizers

        self.model, self.extra_files = model, dict(extra_files or {})
        try:
            content, text = json.loads(model), model.decode()
            if content["model"].pop("dropout", None):  # would make ids random
                text = json.dumps(content)
            self._json = tokenizers.Tokenizer.from_str(text)
            self._json.encode_batch(["a", ""], add_special_tokens=True)
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # the library raises Exception, and panics, itself
            raise UserError(f"{path} is not a supported tokenizer.json: {error}.") from None
        self._json.no_truncation()
        self._json.no_padding()
        self._pieces = {i: piece for piece, i in self._json.get_vocab().items()}
        if not self._pieces or max(self._pieces) >= 2**31 - 1:
            raise UserError(f"{path} is damaged: its vocabulary is empty or has ids beyond 2**31.")
        self.vocab = 1 + max(self._pieces)
        self.symbols = ()
        self._find_special(path)
        self._spell(content, path)
        self.adds_space = self._adds_space()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as int32, without begin and end; on all cores."""
        texts = [replace_surrogates(text) for text in texts]
        try:
            encoded = self._json.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"{self.name} cannot encode a text: {error}.") from None
        return [np.array(each.ids, np.int32) for each in encoded]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of these ids, which may begin or end within a character."""
        return b"".join(self._bytes.get(int(piece), b"") for piece in ids)

    def piece(self, piece: int) -> str:
        """The piece of an id as in the file."""
        return self._pieces.get(piece, "")

    def _adds_space(self) -> bool:
        """Whether a space is added before every text."""
        letters = (piece for piece in self._pieces.values() if len(piece) == 1 and piece.isalpha())
        letter = min(letters, default="a")
        ids = self._json.encode(letter, add_special_tokens=False).ids
        text = "".join(self._pieces[i] for i in ids)
        return text in (f"{_SPACE}{letter}", f"{_BYTE_LEVEL[ord(' ')]}{letter}")

    def _find_special(self, path: str) -> None:
        """Sets the special ids, `stops` and `prefix` from the files beside the tokenizer."""
        config = self._read_extra("tokenizer_config.json")
        generation = self._read_extra("generation_config.json")
        named = {**self._read_extra("special_tokens_map.json"), **config}

        def find(role: str) -> int | None:
            token = named.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if not isinstance(token, str | None):
                raise damaged("tokenizer_config.json", f"{role}_token is not text")
            token_id = self._json.token_to_id(replace_surrogates(token)) if token else None
            if token_id is None:
                token_id = next(iter(ids_of(generation.get(f"{role}_token_id"))), None)
            return token_id

        eos, bos, pad, unk = (find(role) for role in ("eos", "bos", "pad", "unk"))
        stops = [*ids_of(eos), *ids_of(generation.get("eos_token_id"))]
        eos = next((i for i in (*stops, bos) if i is not None), None)
        if eos is None:
            raise UserError(
                f"{path}: the files beside it name no end token; add eos_token to "
                "tokenizer_config.json."
            )
        self.eos, self.stops = eos, tuple(dict.fromkeys(stops or [eos]))
        self.bos = self.eos if bos is None else bos
        self.pad = self.eos if pad is None else pad
        self.unk = -1 if unk is None else unk
        self._json.encode_special_tokens = bool(config.get("split_special_tokens"))
        added = self._json.encode("", add_special_tokens=True).ids
        begins = config.get("add_bos_token")
        if begins is None:
            begins = self.bos in added
        self.prefix = (self.bos,) if begins and bos is not None else ()
        self._check_specials()

    def _spell(self, content: Mapping[str, Any], path: str) -> None:
        """Sets the bytes of each piece."""
        kinds = set(_types(content.get("decoder"))) | set(_types(content.get("pre_tokenizer")))
        if "ByteLevel" in kinds:
            byte_of = {char: byte for byte, char in _BYTE_LEVEL.items()}

            def spell(piece: str) -> bytes:
                return bytes(byte_of[char] for char in piece if char in byte_of)

        elif kinds & {"ByteFallback", "Metaspace", "Replace"}:

            def spell(piece: str) -> bytes:
                if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
                    return bytes([int(piece[3:5], 16)])
                return piece.replace(_SPACE, " ").encode()

        else:
            raise UserError(
                f"{path} has an unknown decoder; byte-level and SentencePiece's are supported."
            )
        self._bytes = {i: spell(piece) for i, piece in self._pieces.items()}
        for i, token in self._json.get_added_tokens_decoder().items():
            self._bytes[i] = b"" if token.special else token.content.encode()


def _types(content: Any) -> Iterator[str]:
    """The `type` fields of a JSON value at any depth."""
    if isinstance(content, Mapping):
        if isinstance(content.get("type"), str):
            yield content["type"]
        for value in content.values():
            yield from _types(value)
    elif isinstance(content, list):
        for value in content:
            yield from _types(value)


def _byte_level() -> dict[int, str]:
    """GPT-2's characters for bytes: printable Latin-1 as it is, other bytes from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {byte: chr(byte) for byte in printable}
    return chars | {byte: chr(256 + index) for index, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level()
