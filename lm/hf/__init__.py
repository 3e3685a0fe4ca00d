"""Hugging Face folders in and out.

families     the open families: a table of weights and a function from config.json for each
config_json  the fields of config.json
weights      reads and writes the weights of a folder; safetensors: their file format
tokenizer    writes a tokenizer as transformers reads it
"""

from lm.hf.tokenizer import export_files
from lm.hf.weights import CONFIG, GENERATION, Pretrained, is_pretrained, write_pretrained

__all__ = [
    "CONFIG",
    "GENERATION",
    "Pretrained",
    "export_files",
    "is_pretrained",
    "write_pretrained",
]
