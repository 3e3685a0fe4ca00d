"""Writes a Hugging Face Llama folder of any size with random weights, to benchmark its import.

python tests/hf/big_folder.py FOLDER --gigabytes 3
python -m lm bench import FOLDER
"""

import argparse
import itertools
import json
from pathlib import Path

import ml_dtypes
import numpy as np

from lm.hf import families, safetensors
from lm.hf.tensors import tensor_slices

HEAD = 128


def write(folder: Path, layers: int, dim: int, vocab: int, shard_bytes: int) -> None:
    """Writes bfloat16 weights in several files with an index."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": dim // HEAD,
        "num_key_value_heads": max(1, dim // HEAD // 4),
        "intermediate_size": dim * 7 // 2,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    family, model = families.read(config)
    dtype = np.dtype(ml_dtypes.bfloat16)
    tensors = {part.name: (part.shape, dtype) for part in tensor_slices(family, model)}
    random = np.random.default_rng(0)
    block = random.integers(0x3800, 0x3C00, 1 << 22).astype(np.uint16).view(dtype)  # small numbers

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        count = int(np.prod(shape))
        start = int(random.integers(0, block.size))
        return np.resize(np.roll(block, start), count).reshape(shape)

    safetensors.write(folder, tensors, (draw(shape) for shape, _ in tensors.values()), shard_bytes)


def layers_for(gigabytes: float, dim: int, vocab: int) -> int:
    """Returns the number of layers whose weights take about `gigabytes`."""
    for layers in itertools.count(1):
        weights = 2 * vocab * dim + layers * dim * dim * (2.5 + 3 * 3.5)
        if 2 * weights >= gigabytes * 1e9:
            return layers


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=128_256)
    options = parser.parse_args()
    layers = layers_for(options.gigabytes, options.dim, options.vocab)
    write(options.folder, layers, options.dim, options.vocab, 10**9)
    print(f"{layers} layers in {options.folder}")
