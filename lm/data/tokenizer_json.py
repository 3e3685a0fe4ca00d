"""A tokenizer.json, as the `tokenizers` library reads it: the tokenizers of Llama 3, Qwen and OLMo,
which work on bytes, and those of Llama 2 and Gemma, which are SentencePiece's."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm.data.tokenizer import Tokenizer, ids_of
from lm.errors import UserError

_SPACE = "\u2581"


class JsonTokenizer(Tokenizer):
    """A Tokenizer made from a tokenizer.json and the files beside it.

    Special tokens are found in text where their spelling stands, as with transformers, so that a
    prompt may be a conversation (but not with `split_special_tokens` in tokenizer_config.json);
    they are decoded to nothing.
    """

    name = "tokenizer.json"

    def __init__(
        self, model: bytes, path: str = "tokenizer.json", beside: Mapping[str, bytes] | None = None
    ):
        import tokenizers

        self.model, self.beside = model, dict(beside or {})
        try:
            self._json = tokenizers.Tokenizer.from_str(model.decode())
            described = json.loads(model)
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"{path} is not a tokenizer that is understood: {error}.") from None
        self._json.no_truncation()
        self._json.no_padding()
        self._pieces = {i: piece for piece, i in self._json.get_vocab().items()}
        self.vocab = 1 + max(self._pieces)
        self._find_special(path)
        self._spell(described, path)
        begins = [self._pieces[i] for i in self._json.encode("a", add_special_tokens=False).ids]
        self._adds_space = "".join(begins) == f"{_SPACE}a"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as int32, without begin and end; on all cores."""
        encoded = self._json.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in encoded]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of these ids, which may begin or end within a character."""
        return b"".join(self._bytes.get(int(piece), b"") for piece in ids)

    def piece(self, piece: int) -> str:
        """How the file writes a piece."""
        return self._pieces.get(piece, "")

    def _find_special(self, path: str) -> None:
        config = self._read_beside("tokenizer_config.json")
        generation = self._read_beside("generation_config.json")
        named = {**self._read_beside("special_tokens_map.json"), **config}

        def find(role: str) -> int | None:
            token = named.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            found = self._json.token_to_id(token) if token else None
            if found is None:
                found = next(iter(ids_of(generation.get(f"{role}_token_id"))), None)
            return found

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

    def _spell(self, described: Mapping[str, Any], path: str) -> None:
        """The bytes of each piece."""
        kinds = set(_types(described.get("decoder"))) | set(_types(described.get("pre_tokenizer")))
        if "ByteLevel" in kinds:
            byte_of = {char: byte for byte, char in _BYTE_LEVEL.items()}

            def spell(piece: str) -> bytes:
                return bytes(byte_of[char] for char in piece if char in byte_of)

        elif kinds & {"ByteFallback", "Metaspace", "Replace"}:

            def spell(piece: str) -> bytes:
                if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                    return bytes([int(piece[3:5], 16)])
                return piece.replace(_SPACE, " ").encode()

        else:
            raise UserError(
                f"{path} joins its pieces in a way that is not known; "
                "byte-level and SentencePiece's are."
            )
        self._bytes = {i: spell(piece) for i, piece in self._pieces.items()}
        for i, token in self._json.get_added_tokens_decoder().items():
            self._bytes[i] = b"" if token.special else token.content.encode()


def _types(described: Any) -> Iterator[str]:
    """Of all parts of a description."""
    if isinstance(described, Mapping):
        if isinstance(described.get("type"), str):
            yield described["type"]
        for value in described.values():
            yield from _types(value)
    elif isinstance(described, list):
        for value in described:
            yield from _types(value)


def _byte_level() -> dict[int, str]:
    """GPT-2's spelling of bytes: printable ones of Latin-1 as they are, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelt = {byte: chr(byte) for byte in printable}
    return spelt | {byte: chr(256 + place) for place, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level()
