"""NF4 with double quantization, by bitsandbytes.

Keys of the recorded arrays: table (the 16 levels), and for each of "plain" and "double": packed
(two codes a byte, the first in the high bits), y (the first rows of the dequantized matrix), and
the scales: absmax (float32), or absmax (uint8), nested_absmax, nested_table and offset.
"""

import bitsandbytes.functional as bnb
import numpy as np
import tiny
import torch

BLOCK, NESTED, ROWS = 64, 256, 8


def record() -> dict[str, np.ndarray]:
    """Codes and scales of `tiny.matrix`."""
    x = torch.from_numpy(tiny.matrix())
    arrays = {"table": bnb.get_4bit_type("nf4", device="cpu").numpy()}
    for name in ("plain", "double"):
        double = name == "double"
        codes, state = bnb.quantize_4bit(
            x, blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
        )
        arrays |= {
            f"{name}/packed": codes.numpy()[:, 0],
            f"{name}/absmax": state.absmax.numpy(),
            f"{name}/y": bnb.dequantize_4bit(codes, state).numpy()[:ROWS],
        }
        if double:
            assert state.state2.blocksize == NESTED
            arrays |= {
                f"{name}/nested_absmax": state.state2.absmax.numpy(),
                f"{name}/nested_table": state.state2.code.numpy(),
                f"{name}/offset": state.offset.numpy(),
            }
    return arrays
