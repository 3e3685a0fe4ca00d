"""The TPU's paged attention, interpreted with memory that starts as NaN, equals the reference, and
that equals attention over whole sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import paged_attention
from kernels_pallas.attention import reference as whole
from kernels_pallas.paged_attention import tpu

STRICT = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
# Weighted means of numbers of size 1, in float32 and another order.
F32_ERROR = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "BLOCK_SLOTS", 16)


def cache(lengths, queries=1, n=4, k=2, h=16, slots=8, width=6, dtype=jnp.float32):
    """Arguments whose pages lie scattered; every slot that no token fills is NaN."""
    b, pages = len(lengths), len(lengths) * width + 1
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (b, queries, n, h)).astype(dtype)
    table = jax.random.permutation(keys[1], pages)[: b * width].reshape(b, width)
    filled = np.zeros((pages, slots), bool)
    for row, length in zip(np.asarray(table), lengths):
        for i in range(length):
            filled[row[i // slots], i % slots] = True
    shape = pages, k, slots, h
    values = (jax.random.normal(key, shape) for key in keys[2:])
    pages = (jnp.where(filled[:, None, :, None], x, jnp.nan).astype(dtype) for x in values)
    return q, *pages, table, jnp.array(lengths)


def both(arguments, params=STRICT, **options):
    with pltpu.force_tpu_interpret_mode(params):
        got = jax.jit(lambda *a: paged_attention(*a, implementation="tpu", **options))(*arguments)
    want = paged_attention(*arguments, implementation="reference", **options)
    assert got.dtype == want.dtype == arguments[0].dtype
    return got.astype(jnp.float32), want.astype(jnp.float32)


@pytest.mark.parametrize(
    ("lengths", "queries", "options"),
    [
        ([40, 0, 3], 1, {}),
        ([48, 17], 3, {"window": 10, "softcap": 5.0}),
        ([5, 48, 2, 33], 4, {"window": 3, "scale": 0.5}),
        ([9], 1, {}),
    ],
    ids=str,
)
def test_equals_the_reference(lengths, queries, options):
    """Empty sequences, ones shorter than the queries, odd numbers of them; unfilled slots are NaN
    and pages before the window are never read."""
    got, want = both(cache(lengths, queries), **options)
    np.testing.assert_allclose(got, want, **F32_ERROR)


def test_the_reference_is_attention_over_the_sequence():
    q, k, v, table, lengths = cache([40, 21], queries=2)
    got = paged_attention(q, k, v, table, lengths, window=9, implementation="reference")
    for b, length in enumerate([40, 21]):
        row = [x[table[b]].swapaxes(1, 2).reshape(1, -1, 2, 16)[:, :length] for x in (k, v)]
        padded = jnp.zeros((1, length, 4, 16)).at[:, -2:].set(q[b])
        want = whole.flash_attention(padded, *row, causal=True, window=9)[0]
        np.testing.assert_allclose(got[b], want[0, -2:], **F32_ERROR)


@pytest.mark.parametrize(("n", "k"), [(4, 4), (6, 1)])
def test_head_groups(n, k):
    np.testing.assert_allclose(*both(cache([40, 7], n=n, k=k)), **F32_ERROR)


def test_bfloat16():
    # The weights are rounded to 8 bits before the sum over values, and the result after it.
    arguments = cache([40, 7], slots=16, width=3, dtype=jnp.bfloat16)
    np.testing.assert_allclose(*both(arguments), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_quantised_pages(dtype):
    keys = jax.random.split(jax.random.key(1), 4)
    q = jax.random.normal(keys[0], (3, 1, 4, 16))
    shape = 7, 2, 128, 16
    k, v = (jax.random.randint(key, shape, -127, 128).astype(dtype) for key in keys[:2])
    k_scales, v_scales = (jax.random.uniform(key, shape[:3]) / 64 for key in keys[2:])
    table = jnp.array([[6, 2], [1, 5], [0, 0]])
    got, want = both(
        (q, k, v, table, jnp.array([200, 131, 0])), k_scales_pks=k_scales, v_scales_pks=v_scales
    )
    np.testing.assert_allclose(got, want, **F32_ERROR)


@pytest.mark.slow
def test_no_race():
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    np.testing.assert_allclose(*both(cache([40, 0, 17, 3]), params), **F32_ERROR)


@pytest.mark.slow
@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 48), min_size=1, max_size=4),
    queries=st.integers(1, 3),
    window=st.none() | st.integers(1, 60),
    softcap=st.none() | st.just(2.0),
)
def test_any_lengths(lengths, queries, window, softcap):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "BLOCK_SLOTS", 16)
        got, want = both(cache(lengths, queries), window=window, softcap=softcap)
    np.testing.assert_allclose(got, want, **F32_ERROR)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({1: jnp.zeros((7, 3, 8, 16)), 2: jnp.zeros((7, 3, 8, 16))}, {}, "4 query heads do not"),
        ({2: jnp.zeros((7, 2, 8, 8))}, {}, "must be alike"),
        ({3: jnp.zeros((1, 6))}, {}, "table_bp is float32"),
        ({4: jnp.zeros((2,), int)}, {}, "lengths_b"),
        ({0: jnp.zeros((1, 1, 4, 16), jnp.bfloat16)}, {}, "both must be float32 or both bfloat16"),
        ({}, {"window": 0}, "window=0"),
        ({}, {"softcap": 0.0}, "softcap=0.0"),
        ({}, {"k_scales_pks": jnp.ones((7, 2, 8))}, "scales go with pages of int8"),
        ({}, {"implementation": "gpu"}, "'gpu' is not one of 'tpu', 'reference'"),
    ],
)
def test_refuses_in_words(change, options, words):
    arguments = list(cache([5]))
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(ValueError, match=words):
        paged_attention(*arguments, **options)


def test_a_tpu_needs_whole_registers():
    with pytest.raises(ValueError, match="pages of 4 slots of float32; they need a multiple of 8"):
        paged_attention(*cache([5], slots=4), implementation="tpu")
