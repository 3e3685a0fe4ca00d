"""Hugging Face folders: import and export of weights, config.json and tokenizer.

families     the supported families; a model's config.json, read and written
family       what a family is: a table of weights and a function from config.json to a Config
llama, mistral, qwen, gemma, olmo, deepseek     the families, by their makers
config_json  the fields of config.json and the parts of a Config
tensors      which tensor holds which slice of a parameter
weights      reads and writes the weights, sharded
safetensors  the file format of the weights
tokenizer    writes a SentencePiece model as tokenizer.json
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
