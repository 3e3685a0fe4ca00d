"""Packed weights are within half a scale; the TPU quantized matmuls, in interpret mode, equal the
reference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import float32, interpreted, jit, normal

from kernels_pallas.quantized_matmul import (
    int8_matmul,
    pack,
    packed_matmul,
    quantize_int8,
    tpu,
    unpack,
)

X, W = normal(0, 40, 1024), normal(1, 1024, 200)
BF16, SLOW = jnp.bfloat16, pytest.mark.slow
pack = jit(pack, static_argnames=("bits", "group"))
unpack, quantize_int8 = jit(unpack), jit(quantize_int8)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "FEW_BLOCKS", (64, 128, 512))
    monkeypatch.setattr(tpu, "INT8_BLOCKS", (16, 128, 384))
    monkeypatch.setattr(tpu, "ROW_BYTES", 2**17)
    monkeypatch.setattr(tpu, "COLUMN_BYTES", 2**19)


def both(function, x, *weights, **interpret):
    """Results of the TPU kernel and of the reference, as float32."""
    with interpreted(**interpret):
        got = jit(functools.partial(function, implementation="tpu"))(x, *weights)
    want = jit(functools.partial(function, implementation="reference"))(x, *weights)
    assert got.dtype == want.dtype == x.dtype
    return float32(got, want)


def compare_packed(x, packed, **interpret):
    """Compares packed_matmul with the reference."""
    got, want = both(packed_matmul, x, packed, **interpret)
    d, w = packed.shape[0], unpack(packed)
    atol, rtol = tolerance.of_sum(d, x, w), 0.0
    if x.dtype == BF16:
        # Kernel and reference round their results.
        rtol = 2 * tolerance.unit_roundoff(BF16)
        if len(x) <= tpu.FEW_BLOCKS[0]:
            # The kernel multiplies x with weights that are up to 136 scales too large.
            atol += tolerance.of_sum(d, x, 136 * np.asarray(packed.scales_gf))
        else:
            # The kernel also rounds each weight, d errors of either sign.
            magnitude = tolerance.largest(x) * tolerance.largest(w)
            atol += d**0.5 * tolerance.unit_roundoff(BF16) * magnitude
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def compare_int8(x, w, scales, **interpret):
    """Compares int8_matmul with the reference. Sums of integers are exact."""
    got, want = both(int8_matmul, x, w, scales, **interpret)
    # Kernel and reference round the products with both scales in float32, and the result.
    roundings = 4 * tolerance.unit_roundoff(jnp.float32) + 2 * tolerance.unit_roundoff(x.dtype)
    np.testing.assert_allclose(got, want, rtol=roundings)


@pytest.mark.parametrize("group", [32, 512, *(pytest.param(g, marks=SLOW) for g in (64, 128, 256))])
@pytest.mark.parametrize("bits", [3, 4])
def test_packed_weights_are_within_half_a_scale(bits, group):
    packed = pack(W, bits=bits, group=group)
    assert (packed.bits, packed.shape, packed.group) == (bits, W.shape, group)
    stored = 4 * (packed.low.size + (0 if packed.high is None else packed.high.size))
    assert 8 * stored == bits * W.size
    scales = np.repeat(np.asarray(packed.scales_gf), group, axis=0)
    weights = np.asarray(unpack(packed))
    assert np.all(np.abs(weights - W) <= 0.5001 * scales)
    # Packing is idempotent, up to four roundings of scales and weights.
    again = unpack(pack(weights, bits=bits, group=group))
    np.testing.assert_allclose(again, weights, rtol=5 * tolerance.unit_roundoff(jnp.float32))


def test_int8_weights_are_within_half_a_scale():
    w = np.array(W)
    w[:, 3] = 0
    q, scales = (np.asarray(x) for x in quantize_int8(w))
    np.testing.assert_array_equal(q[:, 3], 0)
    assert np.all(np.abs(q * scales - w) <= 0.5001 * scales)


QUICK = [(4, 32, BF16, 40), (3, 512, BF16, 40), (4, 32, jnp.float32, 40)]
CASES = itertools.product((3, 4), (32, 512), (jnp.float32, BF16), (40, 80))


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "rows"),
    [*QUICK, *(pytest.param(*case, marks=SLOW) for case in CASES if case not in QUICK)],
)
def test_packed_equals_the_reference(bits, group, dtype, rows):
    """Up to 64 rows of bfloat16 take the kernel for few rows, the others the one for many."""
    x = np.asarray(X).astype(dtype)[:, :512]
    x = jnp.asarray(np.tile(x, (rows // 40, 1)))
    compare_packed(x, pack(W[:512], bits=bits, group=group))


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(BF16, marks=SLOW)])
def test_int8_equals_the_reference(dtype):
    compare_int8(X.astype(dtype), *quantize_int8(W))


def test_int8_is_close_to_the_product():
    got = np.asarray(int8_matmul(X, *quantize_int8(W)))
    # Two roundings, each uniform within half of 1/127 of the largest of about 1000 normal numbers
    # (3.4), over sums of 1024.
    expected = 2**0.5 * 1024**0.5 * 3.4 / 127 / 12**0.5
    assert np.std(got - np.asarray(X) @ np.asarray(W)) < 1.2 * expected


@pytest.mark.parametrize("form", ["int8", "packed"])
def test_the_gradient_is_that_of_the_rounded_weights(form):
    if form == "int8":
        q, scales = quantize_int8(W)
        function, whole = (lambda x: int8_matmul(x, q, scales)), np.asarray(q) * scales
    else:
        packed = pack(W)
        function, whole = (lambda x: packed_matmul(x, packed)), unpack(packed)
    dy = normal(2, 40, 200)
    (dx,) = jit(lambda x, dy: jax.vjp(function, x)[1](dy))(X, dy)
    atol = tolerance.of_sum(200, dy, whole)
    np.testing.assert_allclose(dx, np.asarray(dy) @ np.asarray(whole).T, rtol=0, atol=atol)


@pytest.mark.slow
def test_has_no_race(capfd):
    packed = pack(W)
    compare_packed(X, packed, detect_races=True)
    compare_packed(X.astype(BF16), packed, detect_races=True)
    compare_int8(X, *quantize_int8(W), detect_races=True)
    assert "race" not in capfd.readouterr().out.lower()


@pytest.mark.slow
@settings(deadline=None, max_examples=6, derandomize=True)
@given(
    m=st.integers(1, 90),
    blocks=st.integers(1, 5),
    f=st.sampled_from([3, 128, 257]),
    bits=st.sampled_from([3, 4]),
)
def test_any_shape(m, blocks, f, bits):
    packed, x = pack(normal(3, 256 * blocks, f), bits=bits), normal(4, m, 256 * blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "FEW_BLOCKS", (64, 128, 512))
        compare_packed(x, packed)
        compare_packed(x.astype(BF16)[:64], packed)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pack(W, bits=5), "bits=5 must be 3 or 4"),
        (lambda: pack(W, group=100), "group=100 must be 32, 64, 128 or a multiple of 256"),
        (lambda: pack(W[:300]), "D a multiple of 256"),
        (lambda: packed_matmul(X[:, :256], pack(W)), "must share D"),
        (lambda: packed_matmul(np.asarray(X).astype(np.float16), pack(W)), "x_md is float16"),
        (lambda: int8_matmul(X, W, jnp.ones(200)), "w_df is float32"),
        (lambda: int8_matmul(X, W.astype(jnp.int8), jnp.ones(3)), "each of its 200 columns"),
        (lambda: int8_matmul(X[0], W, jnp.ones(200)), "must share the width D"),
    ],
)
def test_rejects_arguments_that_do_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call()
