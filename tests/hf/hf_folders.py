"""Ten tiny models in Hugging Face format, with reference outputs of transformers 5.23 in float32.

folders/FAMILY/ holds config.json and reference.npz: tokens [2, 96], positions (every fourth), the
logits at these positions, greedy_prompt [1, 16], and greedy [1, 40], the prompt followed by 24
generated tokens. Weights are generated from the recipe in weights.json or stored in
model.safetensors.
"""

import json
import shutil
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

HERE = Path(__file__).parent / "folders"
FAMILIES = (
    "llama2",  # as many key/value heads as query heads
    "llama3",  # fewer key/value heads, scaled RoPE, bfloat16
    "mistral",  # sliding window of 16
    "qwen2",  # biases, tied embeddings
    "qwen3",  # QK-norm, head_dim independent of the model width, tied embeddings
    "gemma2",  # logit soft caps, alternating windows, norms before and after each sublayer
    "gemma3",  # QK-norm, local and global RoPE
    "mixtral",  # bfloat16
    "qwen3_moe",  # bfloat16
    "olmo2",  # norms after each sublayer, QK-norm over the whole projection
)
CODES = {"F32": np.dtype("float32"), "BF16": np.dtype(ml_dtypes.bfloat16)}


def reference(family: str) -> dict[str, np.ndarray]:
    return dict(np.load(HERE / family / "reference.npz"))


def write_folder(family: str, to: Path) -> Path:
    """Copies the folder of a family and adds its weights."""
    folder = to / family
    shutil.copytree(HERE / family, folder)
    if (folder / "weights.json").exists():
        write_weights(folder, drawn(json.loads((folder / "weights.json").read_text())))
    return folder


def drawn(recipe: dict) -> dict[str, np.ndarray]:
    """Returns weights by name: float32(mean + std * normal), cast to the recipe's dtype."""
    arrays = {}
    for name, w in recipe["weights"].items():
        random = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + recipe["seed"]))
        x = random.standard_normal(tuple(w["shape"])) * w["std"] + w["mean"]
        arrays[name] = x.astype(np.float32).astype(recipe["dtype"])
    return arrays


def write_weights(folder: Path, arrays: dict[str, np.ndarray], name="model.safetensors") -> None:
    """Writes safetensors independently of lm.hf, so that it is not tested against itself."""
    header, offset = {}, 0
    for key, x in arrays.items():
        code = next(code for code, dtype in CODES.items() if dtype == x.dtype)
        span = [offset, offset + x.nbytes]
        header[key] = {"dtype": code, "shape": x.shape, "data_offsets": span}
        offset += x.nbytes
    encoded = json.dumps(header).encode()
    arrays_bytes = b"".join(x.tobytes() for x in arrays.values())
    (folder / name).write_bytes(len(encoded).to_bytes(8, "little") + encoded + arrays_bytes)


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Reads the weights from all files of a folder."""
    arrays = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for key, entry in json.loads(data[8:start]).items():
            if key != "__metadata__":
                a, b = entry["data_offsets"]
                flat = np.frombuffer(data[start + a : start + b], CODES[entry["dtype"]])
                arrays[key] = flat.reshape(entry["shape"])
    return arrays
