"""Records the numbers of TRL, PEFT and bitsandbytes that our tests compare with.

    pip install -e ".[oracles]"
    python tests/oracles/make.py

Writes tests/oracles/tokenizer and tests/oracles/recorded. Imports neither jax nor lm. Run it again
only when a version in setup.py's extra `oracles` changes; versions.json says what was run.
"""

import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())

import adapters
import conversations
import losses
import nf4
import numpy as np
import tiny

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def main() -> None:
    """Records everything."""
    shutil.rmtree(tiny.RECORDED, ignore_errors=True)
    tiny.RECORDED.mkdir()
    write_json("versions", {name: importlib.metadata.version(name) for name in PACKAGES})
    conversations.train_tokenizer()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        policy = tiny.write_model(scratch / "policy")
        reference = tiny.write_model(scratch / "reference", seed=1)
        write_json("masks", conversations.record_masks(policy, reference, scratch))
        for part, arrays in losses.record(policy, reference, scratch).items():
            write_arrays(part, arrays)
        write_arrays("adapters", adapters.record(tiny.RECORDED, scratch))
    write_arrays("nf4", nf4.record())


def write_json(name: str, value: Any) -> None:
    """Writes recorded/NAME.json."""
    text = json.dumps(value, ensure_ascii=False)
    (tiny.RECORDED / f"{name}.json").write_text(text + "\n")


def write_arrays(name: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes recorded/NAME.npz."""
    np.savez_compressed(tiny.RECORDED / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
