"""Hugging Face folders: import and export of weights, config.json and tokenizer.

families     the supported families; a model's config.json, read and written
family       what a family is: a table of weights and a function from config.json to a Config
llama, mistral, qwen, gemma, olmo, deepseek     the families, by their makers
config_json  the fields of config.json and the parts of a Config
tensors      which tensor holds which slice of a parameter
peft         adapters in the folder format of PEFT
weights      reads and writes the weights, sharded
safetensors  the file format of the weights
tokenizer    writes a SentencePiece model as tokenizer.json
"""

import os

from lm.hf.peft import AdaptedPretrained, base_of, is_adapter, write_adapter
from lm.hf.tokenizer import export_files
from lm.hf.weights import CONFIG, GENERATION, Pretrained, is_pretrained, write_pretrained

__all__ = [
    "CONFIG",
    "GENERATION",
    "AdaptedPretrained",
    "Pretrained",
    "base_of",
    "export_files",
    "is_adapter",
    "is_pretrained",
    "open_folder",
    "write_adapter",
    "write_pretrained",
]


def open_folder(folder: str | os.PathLike[str]) -> Pretrained | None:
    """The model of a Hugging Face or PEFT folder; None if it is neither."""
    if is_adapter(folder):
        return AdaptedPretrained(folder)
    return Pretrained(folder) if is_pretrained(folder) else None
