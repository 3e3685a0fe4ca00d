"""Tokenizers that exist: a file or a folder of them, a declaration and the loader."""

import json
import os
from dataclasses import dataclass
from typing import Any

from lm.data import files
from lm.data.folder import Folder
from lm.data.tokenizer import Tokenizer
from lm.data.tokenizer_json import JsonTokenizer
from lm.errors import UserError

# Read where they lie beside a model file, and kept with it, for an export gives them back.
BESIDE = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """A tokenizer that exists: a SentencePiece model, a tokenizer.json, or a folder that holds one
    of them, as those of Hugging Face do; a path or an fsspec URL."""

    path: str

    def recipe(self) -> dict[str, Any]:
        """Which model it is: a checksum of its files."""
        return {"tokenizer": "TokenizerFile", "checksum": self.load().checksum}

    def load(self) -> Tokenizer:
        """The tokenizer in the file."""
        return load_tokenizer(self.path)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """From a model file or a folder, local or at an fsspec URL. Raises UserError where there is
    none. Of a folder with both kinds tokenizer.json is taken, which knows added tokens too."""
    folder, name = os.path.split(str(path).rstrip("/"))
    if name == JsonTokenizer.name:
        return _of_folder(Folder(folder or "."))
    if has_tokenizer(path):
        return _of_folder(Folder(path))
    if os.path.isdir(str(path)):
        raise UserError(f"{path} has neither tokenizer.json nor tokenizer.model.")
    with files.reading(str(path)) as file:
        return Tokenizer(file.read(), str(path))


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a tokenizer."""
    there = Folder(folder)
    return any(there.size(kind.name) is not None for kind in (JsonTokenizer, Tokenizer))


def _of_folder(folder: Folder) -> Tokenizer:
    found = {name: data for name in BESIDE if (data := folder.read(name)) is not None}
    model = folder.read(JsonTokenizer.name)
    if model is not None:
        return JsonTokenizer(model, folder.where(JsonTokenizer.name), found)
    model = found.pop(Tokenizer.name)
    tokenizer = Tokenizer(model, folder.where(Tokenizer.name), found)
    _check_added(folder, tokenizer)
    return tokenizer


def _check_added(folder: Folder, tokenizer: Tokenizer) -> None:
    """A SentencePiece model alone does not know what was added to it."""
    listed = json.loads(tokenizer.beside.get("tokenizer_config.json", b"{}"))
    added = json.loads(tokenizer.beside.get("added_tokens.json", b"{}"))
    ids = [*map(int, listed.get("added_tokens_decoder", {})), *added.values()]
    if any(i >= tokenizer.vocab for i in ids):
        raise UserError(
            f"{folder} adds tokens to its tokenizer.model and has no tokenizer.json; write one "
            "with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
