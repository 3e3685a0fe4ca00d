"""The Hopper attention kernels, interpreted on CPU, equal attention in blocks, which
test_attention.py compares with the specification: values, log-sum-exp and all gradients.

Each case runs in a process of its own, this file with the name of the case. The interpreter's
threads wait for each other in callbacks and deadlock if there are only as many threads as cores on
a small machine; JAX reads both variables that change this only once.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from kernel_helpers import float32, jit, normal

from kernels_pallas import flash_attention

ROOT = Path(__file__).parents[2]
SEGMENTS = np.repeat([[1, 2, 0], [4, 4, 5]], [70, 50, 30], axis=1)
# name: (B, T, S, N, K, H, options)
CASES = {
    "small": (1, 100, 100, 1, 1, 64, {"segment_ids": SEGMENTS[:1, :100]}),
    "grouped": (1, 100, 100, 2, 1, 64, {"segment_ids": SEGMENTS[:1, :100]}),
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
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, h)
    return [2 * normal(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes)]


def results(implementation, arrays, options):
    """Output, log-sum-exp and all gradients of a fixed projection of both."""

    def projected(*arrays):
        out, lse = flash_attention(
            *arrays, return_lse=True, implementation=implementation, **options
        )
        toward = normal(9, *out.shape)
        # Rows without visible keys have an lse of -1e30, which would dwarf the other terms.
        visible_lse = jnp.where(lse > -1e29, lse, 0)
        loss = jnp.sum(out.astype(jnp.float32) * toward) + jnp.sum(visible_lse * toward[..., 0])
        return loss, (out, lse)

    run = jit(jax.grad(projected, (0, 1, 2), has_aux=True))
    gradients, (out, lse) = run(*arrays)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients)))


def share_compiled_threads() -> None:
    """Compiles the program of the interpreter's threads once, not once per thread and call."""
    try:
        from jax._src.pallas.mosaic.interpret import thread_map
    except ImportError:  # another version of JAX
        return
    lock, compiled = threading.Lock(), {}

    def run(jaxpr, consts, *args):
        with lock:
            if id(jaxpr) not in compiled:
                function = jit(lambda *a: jax.core.eval_jaxpr(jaxpr, consts, *a) and None)
                compiled[id(jaxpr)] = function.lower(*args).compile()
        compiled[id(jaxpr)](*args)

    thread_map._run_jaxpr = run


def compare(name: str) -> None:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call, params

    share_compiled_threads()
    *shape, options = CASES[name]
    dtype = options.pop("dtype", jnp.bfloat16)
    arrays = inputs(*shape, dtype)
    with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
        got = results("hopper", arrays, options)
    assert not interpret_pallas_call.get_races().races_found
    want = results("reference", float32(*arrays), options)
    for leaf, expected in want.items():
        visible = np.where(np.asarray(expected) < -1e29, 0, expected)
        # Weights, gradients of scores and results are rounded.
        atol = max(1.0, tolerance.largest(visible)) * 5 * tolerance.unit_roundoff(jnp.bfloat16)
        difference = np.abs(*float32(np.float32(got[leaf]) - np.float32(expected))).max()
        print(f"{leaf}: {difference:.2g}, tolerance {atol:.2g}")
        assert difference <= atol, leaf


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "small"]


@pytest.mark.parametrize("name", ["small", *SLOW])
def test_equals_attention_in_blocks(name):
    environment = os.environ | {
        "PJRT_NPROC": "16",
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
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
        ({"prefix": 3}, "prefix"),
        ({"sinks": np.ones(2)}, "sinks"),
        ({"alibi": np.ones(2)}, "alibi"),
        ({"window": 9, "sink_tokens": 2}, "sink_tokens"),
        ({"dtype": jnp.float32}, r"float32 \(only bfloat16 and float16\)"),
        ({"h": 80}, r"head width 80 \(only 64 and 128\)"),
    ],
)
def test_rejects_unsupported_options(change, words):
    arrays = inputs(1, 8, 8, 2, 1, change.pop("h", 64), change.pop("dtype", jnp.bfloat16))
    with pytest.raises(ValueError, match=f"'hopper' does not support {words}; omit"):
        flash_attention(*arrays, implementation="hopper", **change)


if __name__ == "__main__":
    compare(sys.argv[1])
