"""Loading an existing tokenizer from a file or folder."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lm.data import files
from lm.data.folder import Folder
from lm.data.json_files import damaged, is_id, json_object
from lm.data.tokenizer import Tokenizer, TokenizerConfig
from lm.data.tokenizer_json import JsonTokenizer
from lm.errors import UserError

ADDED = "added_tokens.json"

# Files that are loaded with a model file and saved with it, so that an export contains them.
EXTRA_FILES = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    ADDED,
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, kw_only=True)
class TokenizerFile(TokenizerConfig):
    """Loads a tokenizer. `path` is a SentencePiece model, a tokenizer.json, or a folder with one of
    them, as Hugging Face's have; local or an fsspec URL."""

    path: str

    def __post_init__(self) -> None:
        if self.path == "":
            raise UserError("tokenizer.path='' names no file; set it to a file or folder.")

    def build(self, texts: Iterable[str]) -> Tokenizer:
        return self.load()

    def recipe(self) -> dict[str, Any]:
        """Identifies the tokenizer by a checksum of its files."""
        return {"tokenizer": "TokenizerFile", "checksum": self.load().checksum}

    def load(self) -> Tokenizer:
        """Loads the tokenizer."""
        return load_tokenizer(self.path)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer from a model file or folder, local or at an fsspec URL. In a folder with
    both kinds, tokenizer.json takes precedence, since it includes added tokens.

    Raises UserError if there is none.
    """
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
    """Whether a folder contains a tokenizer."""
    place = Folder(folder)
    return any(place.size(kind.name) is not None for kind in (JsonTokenizer, Tokenizer))


def _of_folder(folder: Folder) -> Tokenizer:
    extra_files = {name: data for name in EXTRA_FILES if (data := folder.read(name)) is not None}
    extra_files |= _special_ids(folder, extra_files)
    model = folder.read(JsonTokenizer.name)
    if model is not None:
        return JsonTokenizer(model, folder.path_to(JsonTokenizer.name), extra_files)
    model = extra_files.pop(Tokenizer.name)
    tokenizer = Tokenizer(model, folder.path_to(Tokenizer.name), extra_files)
    _check_added(folder, tokenizer)
    return tokenizer


def _special_ids(folder: Folder, extra_files: dict[str, bytes]) -> dict[str, bytes]:
    """A generation_config.json with the special ids of config.json, for a folder whose own has no
    end tokens, as transformers makes one."""
    name = "generation_config.json"
    own = json_object(extra_files.get(name, b"{}"), folder.path_to(name))
    content = folder.read("config.json")
    if own.get("eos_token_id") is not None or content is None:
        return {}
    config = json_object(content, folder.path_to("config.json"))
    text = config.get("text_config")
    config = (text if isinstance(text, dict) else {}) | config
    ids = {f"{role}_token_id": config.get(f"{role}_token_id") for role in ("bos", "eos", "pad")}
    ids = {key: value for key, value in ids.items() if value is not None}
    return {name: json.dumps(own | ids).encode()} if "eos_token_id" in ids else {}


def _check_added(folder: Folder, tokenizer: Tokenizer) -> None:
    """Raises UserError for tokens that were added outside of the SentencePiece model."""
    ids = []
    for name, field in (("tokenizer_config.json", "added_tokens_decoder"), (ADDED, None)):
        where = folder.path_to(name)
        content = json_object(tokenizer.extra_files.get(name, b"{}"), where)
        tokens = content.get(field, {}) if field else content
        if not isinstance(tokens, dict):
            raise damaged(where, f"{field} is not a JSON object")
        for each in tokens if field else tokens.values():
            is_number = isinstance(each, str) and each.isdecimal() and len(each) < 20
            number = int(each) if field and is_number else each
            if not is_id(number):
                raise damaged(where, f"{each!r} is no token id")
            ids.append(number)
    if any(i >= tokenizer.vocab for i in ids):
        raise UserError(
            f"{folder} adds tokens to its tokenizer.model and has no tokenizer.json; write one "
            "with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
