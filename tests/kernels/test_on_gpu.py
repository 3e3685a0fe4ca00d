"""Attention on a GPU equals the specification in float32, values and gradients:

JAX_PLATFORMS=cuda,cpu python -m pytest tests/kernels/test_on_gpu.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance

from kernels_pallas import flash_attention
from kernels_pallas.attention import reference

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

B, T, N, K, H = 2, 1100, 4, 2, 128
SEGMENTS = np.repeat([[1, 2, 3, 4, 0], [5, 5, 5, 6, 6]], T // 5, axis=1)
# cuDNN runs the first four.
CASES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 200},
    "scale": {"scale": 0.2},
    "segments": {"segment_ids": SEGMENTS},
    "segments_full": {"segment_ids": SEGMENTS, "causal": False},
    "segments_window": {"segment_ids": SEGMENTS, "window": 100},
    "softcap": {"softcap": 5.0},
    "positions": {"positions": np.broadcast_to(np.arange(T) // 2, (B, T))},
    "prefix": {"prefix": np.array([3, 400])},
}
PAIRS = [
    (implementation, name)
    for implementation in (None, "reference", "hopper")
    for name in CASES
    if (implementation, name) != ("hopper", "prefix")  # not supported
]


def arrays(dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        2 * jax.random.normal(key, (B, T, n, H)).astype(dtype) for key, n in zip(keys, (N, K, K))
    ]


def results(function, arrays):
    """Output and gradients of a fixed projection of the output."""

    def projected(*arrays):
        out = function(*arrays)
        toward = jax.random.normal(jax.random.key(9), out.shape)
        return jnp.sum(out.astype(jnp.float32) * toward), out

    run = jax.jit(jax.value_and_grad(projected, (0, 1, 2), has_aux=True))
    (_, out), gradients = run(*arrays)
    return {"out": out} | dict(zip(("dq", "dk", "dv"), gradients))


@pytest.mark.parametrize(("implementation", "name"), PAIRS)
def test_equals_the_specification(implementation, name):
    options = CASES[name]
    got = results(
        lambda *a: flash_attention(*a, implementation=implementation, **options), arrays()
    )
    with jax.default_matmul_precision("highest"):
        exact = [x.astype(jnp.float32) for x in arrays()]
        want = results(lambda *a: reference.flash_attention(*a, **options)[0], exact)
    for leaf, expected in want.items():
        # Weights, their gradients and results are rounded.
        atol = tolerance.of_chain(expected, roundings=5, dtype=jnp.bfloat16)
        difference = np.abs(np.float32(got[leaf]) - np.float32(expected))
        assert difference.max() < atol, leaf


@pytest.mark.parametrize("implementation", [None, "hopper"])
def test_gradients_are_deterministic(implementation):
    options = {"segment_ids": SEGMENTS, "implementation": implementation}
    first, second = (results(lambda *a: flash_attention(*a, **options), arrays()) for _ in range(2))
    for leaf, value in first.items():
        np.testing.assert_array_equal(np.float32(value), np.float32(second[leaf]), err_msg=leaf)
