"""Packing keeps each weight within half a scale; the TPU's products, interpreted with memory that
starts as NaN, equal the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.quantized_matmul import (
    int8_matmul,
    pack,
    packed_matmul,
    quantize_int8,
    tpu,
    unpack,
)

STRICT = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
X = jax.random.normal(jax.random.key(0), (40, 1024))
W = jax.random.normal(jax.random.key(1), (1024, 200))
# Sums of 1024 products of numbers of size 1, in float32 and another order.
F32_ERROR = {"rtol": 1e-5, "atol": 3e-4}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "FEW_BLOCKS", (64, 128, 512))
    monkeypatch.setattr(tpu, "INT8_BLOCKS", (16, 128, 384))
    monkeypatch.setattr(tpu, "ROW_BYTES", 2**17)
    monkeypatch.setattr(tpu, "COLUMN_BYTES", 2**19)


def both(function, *arguments, params=STRICT):
    with pltpu.force_tpu_interpret_mode(params):
        got = function(*arguments, implementation="tpu")
    want = function(*arguments, implementation="reference")
    assert got.dtype == want.dtype == arguments[0].dtype
    return got.astype(jnp.float32), want.astype(jnp.float32)


@pytest.mark.parametrize("group", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("bits", [3, 4])
def test_packed_weights_are_within_half_a_scale(bits, group):
    packed = pack(W, bits=bits, group=group)
    assert (packed.bits, packed.shape, packed.group) == (bits, W.shape, group)
    stored = 4 * (packed.low.size + (0 if packed.high is None else packed.high.size))
    assert 8 * stored == bits * W.size
    scales = jnp.repeat(packed.scales_gf, group, axis=0)
    assert jnp.all(jnp.abs(unpack(packed) - W) <= 0.5001 * scales)
    # Already rounded weights come back as they are.
    again = pack(unpack(packed), bits=bits, group=group)
    np.testing.assert_allclose(unpack(again), unpack(packed), rtol=1e-6)


def test_8_bits_are_within_half_a_scale():
    q, scales = quantize_int8(W.at[:, 3].set(0))
    np.testing.assert_array_equal(q[:, 3], 0)
    assert jnp.all(jnp.abs(q * scales - W.at[:, 3].set(0)) <= 0.5001 * scales)


@pytest.mark.parametrize("group", [32, 512])
@pytest.mark.parametrize("bits", [3, 4])
def test_packed_equals_the_reference(bits, group):
    packed = pack(W, bits=bits, group=group)
    np.testing.assert_allclose(*both(packed_matmul, X, packed), **F32_ERROR)
    # With few rows of bfloat16 products are exact, and results are rounded to 8 bits. With many
    # the weights are too: each of 1024 terms by 2**-9 of itself, with random signs.
    few, many = X.astype(jnp.bfloat16), jnp.tile(X, (2, 1)).astype(jnp.bfloat16)
    np.testing.assert_allclose(*both(packed_matmul, few, packed), rtol=2**-7, atol=0.01)
    np.testing.assert_allclose(*both(packed_matmul, many, packed), rtol=2**-7, atol=0.3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_int8_equals_the_reference(dtype):
    """Sums of whole numbers are exact."""
    got, want = both(int8_matmul, X.astype(dtype), *quantize_int8(W))
    np.testing.assert_allclose(got, want, rtol=1e-6 if dtype == jnp.float32 else 2**-7)


def test_int8_is_close_to_the_product():
    got = int8_matmul(X, *quantize_int8(W))
    # Two roundings, each uniform within half of 1/127 of the largest of about 1000 normal numbers
    # (3.4), over sums of 1024.
    expected = 2**0.5 * 1024**0.5 * 3.4 / 127 / 12**0.5
    assert jnp.std(got - X @ W) < 1.2 * expected


@pytest.mark.parametrize("form", ["int8", "packed"])
def test_the_gradient_is_that_of_the_rounded_weights(form):
    if form == "int8":
        q, scales = quantize_int8(W)
        function, whole = (lambda x: int8_matmul(x, q, scales)), q * scales
    else:
        packed = pack(W)
        function, whole = (lambda x: packed_matmul(x, packed)), unpack(packed)
    dy = jax.random.normal(jax.random.key(2), (40, 200))
    (dx,) = jax.vjp(function, X)[1](dy)
    np.testing.assert_allclose(dx, dy @ whole.T, **F32_ERROR)


@pytest.mark.slow
def test_no_race():
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    packed = pack(W)
    np.testing.assert_allclose(*both(packed_matmul, X, packed, params=params), **F32_ERROR)
    few = X.astype(jnp.bfloat16)
    got = both(packed_matmul, few, packed, params=params)
    np.testing.assert_allclose(*got, rtol=2**-7, atol=0.01)
    got = both(int8_matmul, X, *quantize_int8(W), params=params)
    np.testing.assert_allclose(*got, rtol=1e-6)


@pytest.mark.slow
@settings(deadline=None, max_examples=6, derandomize=True)
@given(
    m=st.integers(1, 90),
    blocks=st.integers(1, 5),
    f=st.sampled_from([3, 128, 257]),
    bits=st.sampled_from([3, 4]),
)
def test_any_shape(m, blocks, f, bits):
    w = jax.random.normal(jax.random.key(3), (256 * blocks, f))
    x = jax.random.normal(jax.random.key(4), (m, 256 * blocks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "FEW_BLOCKS", (64, 128, 512))
        np.testing.assert_allclose(*both(packed_matmul, x, pack(w, bits=bits)), **F32_ERROR)
        few = x.astype(jnp.bfloat16)[:64]
        got = both(packed_matmul, few, pack(w, bits=bits))
        np.testing.assert_allclose(*got, rtol=2**-7, atol=0.01)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pack(W, bits=5), "bits=5 must be 3 or 4"),
        (lambda: pack(W, group=100), "group=100 must be 32, 64, 128 or a multiple of 256"),
        (lambda: pack(W[:300]), "D a multiple of 256"),
        (lambda: packed_matmul(X[:, :256], pack(W)), "must share D"),
        (lambda: packed_matmul(X.astype(jnp.float16), pack(W)), "x_md is float16"),
        (lambda: int8_matmul(X, W, jnp.ones(200)), "w_df is float32"),
        (lambda: int8_matmul(X, W.astype(jnp.int8), jnp.ones(3)), "each of its 200 columns"),
        (lambda: int8_matmul(X[0], W, jnp.ones(200)), "must share the width D"),
    ],
)
def test_refuses_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()
