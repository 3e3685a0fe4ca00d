"""The TPU's grouped product, interpreted with memory that starts as NaN, equals the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import grouped_matmul
from kernels_pallas.grouped_matmul import reference, tpu

STRICT = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
# Small blocks, so that small arrays have several of each.
SMALL = {
    "ROWS": 64, "DEEP": 256, "WEIGHTS": 256 * 128, "WIDE": 512, "BLOCK_D": 256, "BLOCK_F": 256,
    "PART": 8, "SUM_PART": 16,
}  # fmt: skip
# Sums of up to 300 products of numbers of size 1, in another order.
F32_ERROR = {"rtol": 1e-5, "atol": 1e-4}


@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(tpu, name, value)


def arrays(m, d, f, e, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (m, d), (e, d, f), (m, f)
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes)]


def compare(x, w, dy, sizes, tolerance, params=STRICT):
    """Values and both gradients; rows past the last group may hold anything."""
    sizes = jnp.array(sizes)
    inside = jnp.arange(len(x))[:, None] < sizes.sum()

    def run(x, w, dy, implementation):
        def product(x, w):
            return grouped_matmul(x, w, sizes, implementation=implementation)

        y, pull = jax.vjp(product, x, w)
        return y, *pull(dy)

    with pltpu.force_tpu_interpret_mode(params):
        got = jax.jit(lambda *a: run(*a, "tpu"))(jnp.where(inside, x, jnp.nan), w, dy)
    exact = (a.astype(jnp.float32) for a in (x, w, dy))
    want = jax.jit(lambda *a: run(*a, "reference"))(*exact)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == x.dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, **tolerance)


@pytest.mark.parametrize(
    "sizes",
    [[5, 0, 20, 16, 3], [0, 0, 0, 0, 0], [70, 0, 0, 0, 0], [0, 0, 1, 0, 69], [8, 8, 16, 8, 24]],
    ids=str,
)
def test_equals_the_reference(small, sizes):
    compare(*arrays(70, 128, 200, 5), sizes, F32_ERROR)


def test_deep_sums_are_cut(small):
    """A width above DEEP that is no multiple of 128 is filled up, and summed in parts."""
    compare(*arrays(40, 600, 520, 3), [11, 9, 17], F32_ERROR)


def test_bfloat16(small):
    # A result is rounded to 8 bits; the sums themselves are in float32.
    tolerance = {"rtol": 2**-8, "atol": 1e-4}
    compare(*arrays(70, 128, 200, 3, jnp.bfloat16), [30, 1, 36], tolerance)


@pytest.mark.slow
def test_no_race(small):
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    compare(*arrays(40, 256, 256, 3), [11, 9, 17], F32_ERROR, params)


@pytest.mark.slow
@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    spare=st.integers(0, 9),
    d=st.sampled_from([8, 96, 128, 640]),
    f=st.sampled_from([5, 128, 300]),
)
def test_any_shape(sizes, spare, d, f):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(tpu, name, value)
        rows = max(1, sum(sizes) + spare)
        compare(*arrays(rows, d, f, len(sizes)), sizes, F32_ERROR)


@pytest.mark.parametrize("implementation", ["tpu", "reference"])
def test_weights_of_8_bits(small, implementation):
    x, _, dy = arrays(70, 128, 200, 3)
    keys = jax.random.split(jax.random.key(1))
    w = jax.random.randint(keys[0], (3, 128, 200), -127, 128, jnp.int8)
    scales = jax.random.uniform(keys[1], (3, 200)) / 64
    sizes = jnp.array([30, 1, 36])

    def product(x):
        return grouped_matmul(x, w, sizes, scales_ef=scales, implementation=implementation)

    with pltpu.force_tpu_interpret_mode(STRICT):
        y, pull = jax.vjp(product, x)
        (dx,) = pull(dy)
    whole = w * scales[:, None]
    want, pull = jax.vjp(lambda x: reference.grouped_matmul(x, whole, sizes), x)
    np.testing.assert_allclose(y, want, **F32_ERROR)
    np.testing.assert_allclose(dx, pull(dy)[0], **F32_ERROR)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scales_ef": jnp.ones((3, 8))}, "scales go with a w of int8, not float32"),
        ({"implementation": "cuda"}, "'cuda' is not one of 'tpu', 'reference'"),
    ],
)
def test_refuses(options, words):
    x, w, _ = arrays(4, 8, 8, 3)
    with pytest.raises(ValueError, match=words):
        grouped_matmul(x, w, jnp.array([1, 1, 1]), **options)
    with pytest.raises(ValueError, match=r"one for each column of each matrix is \(3, 8\)"):
        grouped_matmul(x, w.astype(jnp.int8), jnp.array([1, 1, 1]), scales_ef=jnp.ones((3, 4)))
