"""Our kernels for Hopper GPUs, interpreted on CPU, equal the plain form that test_attention.py
holds to the specification: values, log-sum-exp and all gradients.

Each case is a process of its own, this file run with its name: the interpreter's threads wait for
each other in callbacks, and with as few threads as a small machine has cores none of them gets on;
JAX reads both variables once. In bfloat16 and float16 the weights, the scores' gradients and the
results are rounded (2**-9 relative in bfloat16).
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import flash_attention

ROOT = Path(__file__).parents[2]
SEGMENTS = np.repeat([[1, 2, 0], [4, 4, 5]], [70, 50, 30], axis=1)
# name: (B, T, S, N, K, H, options)
CASES = {
    "small": (1, 100, 100, 2, 1, 64, {"segment_ids": SEGMENTS[:1, :100]}),
    "everything": (
        *(2, 150, 150, 2, 1, 64),
        {"segment_ids": SEGMENTS, "window": 60, "softcap": 3.0, "scale": 0.2},
    ),
    "causal": (1, 260, 260, 2, 2, 64, {}),
    "float16": (
        *(1, 130, 130, 1, 1, 128),
        {"dtype": jnp.float16, "segment_ids": SEGMENTS[:1, :130]},
    ),
    "full": (1, 70, 200, 1, 1, 64, {"causal": False}),
    "window": (1, 300, 300, 1, 1, 64, {"window": 20}),
    "segments_full": (1, 150, 150, 1, 1, 64, {"segment_ids": SEGMENTS[:1], "causal": False}),
    "ids_that_come_again": (
        *(1, 390, 390, 1, 1, 64),
        {"segment_ids": np.repeat([[1, 2, 1]], 130, axis=1)},
    ),
    "positions": (
        *(2, 5, 150, 1, 1, 64),
        {"positions": np.array([[3, 4, 5, 6, 7], [149, 140, 9, 0, 160]]), "window": 100},
    ),
    "nothing_visible": (
        *(1, 5, 150, 1, 1, 64),
        {"positions": np.zeros((1, 5), int), "segment_ids": np.full((1, 5), 7),
         "kv_segment_ids": SEGMENTS[:1]},
    ),
}  # fmt: skip


def inputs(b, t, s, n, k, h, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, h)
    return [2 * jax.random.normal(r, shape).astype(dtype) for r, shape in zip(keys, shapes)]


def results(implementation, arrays, options):
    """Output, log-sum-exp and all gradients of a fixed projection of both."""

    def projected(*arrays):
        out, lse = flash_attention(
            *arrays, return_lse=True, implementation=implementation, **options
        )
        toward = jax.random.normal(jax.random.key(9), out.shape)
        # A row that sees nothing has an lse of -1e30, beside which the rest would be lost.
        seen = jnp.where(lse > -1e29, lse, 0)
        loss = jnp.sum(out.astype(jnp.float32) * toward) + jnp.sum(seen * toward[..., 0])
        return loss, (out, lse)

    gradients, (out, lse) = jax.grad(projected, (0, 1, 2), has_aux=True)(*arrays)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients)))


def compare(name: str) -> None:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call, params

    *shape, options = CASES[name]
    dtype = options.pop("dtype", jnp.bfloat16)
    arrays = inputs(*shape, dtype)
    with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
        got = results("hopper", arrays, options)
        got = {leaf: np.float32(value) for leaf, value in got.items()}
    assert not interpret_pallas_call.get_races().races_found
    want = results("reference", [x.astype(jnp.float32) for x in arrays], options)
    for leaf, expected in want.items():
        largest = max(1.0, np.abs(np.where(expected < -1e29, 0, expected)).max())
        difference = np.abs(got[leaf] - np.float32(expected)).max()
        print(f"{leaf}: {difference:.2g} of {largest:.2g}")
        assert difference <= 0.02 * largest, leaf


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "small"]


@pytest.mark.parametrize("name", ["small", *SLOW])
def test_equals_the_plain_form(name):
    environment = os.environ | {
        "PJRT_NPROC": "16",
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, __file__, name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prefix": 3}, "no prefix"),
        ({"sinks": np.ones(2)}, "no sinks"),
        ({"alibi": np.ones(2)}, "no alibi"),
        ({"window": 9, "sink_tokens": 2}, "no sink_tokens"),
        ({"dtype": jnp.float32}, r"no float32 \(bfloat16 and float16\)"),
        ({"h": 80}, r"no heads of 80 \(64 and 128\)"),
    ],
)
def test_refuses_in_words(change, words):
    arrays = inputs(1, 8, 8, 2, 1, change.pop("h", 64), change.pop("dtype", jnp.bfloat16))
    with pytest.raises(ValueError, match=f"implementation='hopper' has {words}; leave"):
        flash_attention(*arrays, implementation="hopper", **change)


if __name__ == "__main__":
    compare(sys.argv[1])
