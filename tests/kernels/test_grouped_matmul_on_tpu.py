"""The TPU grouped matmul, in interpret mode, equals the reference; values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import float32, integers, interpreted, jit, normal, uniform

from kernels_pallas import grouped_matmul
from kernels_pallas.grouped_matmul import reference, tpu

# Small blocks, so that small arrays have several of each.
SMALL = {
    "ROWS": 64, "DEEP": 256, "WEIGHTS": 256 * 128, "WIDE": 512, "BLOCK_D": 256, "BLOCK_F": 256,
    "PART": 8, "SUM_PART": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(tpu, name, value)


def arrays(m, d, f, e, dtype=jnp.float32):
    """x_md, w_edf and dy_mf."""
    shapes = (m, d), (e, d, f), (m, f)
    return [normal(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes)]


def value_and_gradients(implementation, x, w, dy, sizes):
    """(y, dx, dw)."""

    def product(x, w):
        return grouped_matmul(x, w, sizes, implementation=implementation)

    y, pull = jax.vjp(product, x, w)
    return y, *pull(dy)


by_reference = jit(functools.partial(value_and_gradients, "reference"))


def compare(x, w, dy, sizes, run=None, **interpret):
    """Compares y, dx and dw with the reference in float32; rows past the last group hold NaN."""
    inside = np.arange(len(x))[:, None] < sum(sizes)
    sizes = jnp.array(sizes, jnp.int32)
    x_nan = jnp.asarray(np.where(inside, x, np.asarray(np.nan, x.dtype)))
    with interpreted(**interpret):
        run = run or jit(functools.partial(value_and_gradients, "tpu"))
        got = run(x_nan, w, dy, sizes)
    want = by_reference(*float32(x, w, dy), sizes)
    (m, d), f = x.shape, w.shape[2]
    atols = tolerance.of_sum(d, x, w), tolerance.of_sum(f, dy, w), tolerance.of_sum(m, x, dy)
    # Sums are in float32; results are rounded to the dtype.
    rtol = tolerance.unit_roundoff(x.dtype)
    for a, b, atol in zip(got, want, atols, strict=True):
        assert a.dtype == x.dtype
        np.testing.assert_allclose(*float32(a, b), rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def compiled():
    """The kernels for M 70, D 128, F 200, E 5, compiled once for all group sizes."""
    with pytest.MonkeyPatch.context() as patch, interpreted():
        for name, value in SMALL.items():
            patch.setattr(tpu, name, value)
        run = jit(functools.partial(value_and_gradients, "tpu"))
        return run.lower(*arrays(70, 128, 200, 5), jnp.zeros(5, jnp.int32)).compile()


@pytest.mark.parametrize(
    "sizes",
    [[5, 0, 20, 16, 3], [0, 0, 0, 0, 0], [70, 0, 0, 0, 0], [0, 0, 1, 0, 69], [8, 8, 16, 8, 24]],
    ids=str,
)
def test_equals_the_reference(compiled, sizes):
    compare(*arrays(70, 128, 200, 5), sizes, run=compiled)


@pytest.mark.slow
def test_deep_sums_are_split():
    """A width above DEEP that is not a multiple of 128 is padded, and summed in parts."""
    compare(*arrays(40, 600, 520, 3), [11, 9, 17])


@pytest.mark.slow
def test_bfloat16():
    compare(*arrays(24, 128, 72, 2, jnp.bfloat16), [9, 12])


@pytest.mark.slow
def test_has_no_race(capfd):
    compare(*arrays(40, 256, 256, 3), [11, 9, 17], detect_races=True)
    assert "race" not in capfd.readouterr().out.lower()


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
        compare(*arrays(rows, d, f, len(sizes)), sizes)


@pytest.mark.parametrize(
    "implementation", ["tpu", pytest.param("reference", marks=pytest.mark.slow)]
)
def test_int8_weights(implementation):
    m, d, f, e = 24, 128, 72, 2
    x, _, dy = arrays(m, d, f, e)
    w, scales = integers(3, -127, 128, e, d, f, dtype=jnp.int8), uniform(4, e, f) / 64
    sizes = jnp.array([9, 12])

    def run(product, x, dy):
        y, pull = jax.vjp(product, x)
        return y, *pull(dy)

    def quantized(x):
        return grouped_matmul(x, w, sizes, scales_ef=scales, implementation=implementation)

    dequantized = np.asarray(w, np.float32) * np.asarray(scales)[:, None]
    with interpreted():
        y, dx = jit(functools.partial(run, quantized))(x, dy)
    want, want_dx = jit(
        functools.partial(run, lambda x: reference.grouped_matmul(x, dequantized, sizes))
    )(x, dy)
    np.testing.assert_allclose(y, want, rtol=0, atol=tolerance.of_sum(d, x, dequantized))
    np.testing.assert_allclose(dx, want_dx, rtol=0, atol=tolerance.of_sum(f, dy, dequantized))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scales_ef": jnp.ones((3, 8))}, "scales_ef needs a w of int8, not float32"),
        ({"implementation": "cuda"}, "'cuda' is not one of 'tpu', 'reference'"),
    ],
)
def test_rejects_arguments_that_do_not_fit(options, words):
    x, w, _ = arrays(4, 8, 8, 3)
    with pytest.raises(ValueError, match=words):
        grouped_matmul(x, w, jnp.array([1, 1, 1]), **options)
    with pytest.raises(ValueError, match=r"one scale per column of each matrix, \(3, 8\)"):
        grouped_matmul(x, w.astype(jnp.int8), jnp.array([1, 1, 1]), scales_ef=jnp.ones((3, 4)))
