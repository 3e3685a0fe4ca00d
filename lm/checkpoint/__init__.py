"""Checkpoints: a run's state on disk, and back onto any mesh (store); weights of Hugging Face
folders in and out (hf), which are files of the safetensors format."""

from lm.checkpoint.hf import CONFIG, GENERATION, Pretrained, is_pretrained, write_pretrained
from lm.checkpoint.store import Save, Store

__all__ = [
    "CONFIG",
    "GENERATION",
    "Pretrained",
    "Save",
    "Store",
    "is_pretrained",
    "write_pretrained",
]
