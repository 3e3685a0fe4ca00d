"""The TPU paged attention, in interpret mode, equals the reference, and the reference equals
attention over whole sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import float32, integers, interpreted, jit, normal, uniform

from kernels_pallas import paged_attention
from kernels_pallas.attention import reference as whole
from kernels_pallas.paged_attention import tpu


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "BLOCK_SLOTS", 16)


def cache(lengths, queries=1, n=4, k=2, h=16, slots=8, width=6, dtype=jnp.float32):
    """Arguments with randomly placed pages. Slots without a token hold NaN."""
    b, count = len(lengths), len(lengths) * width + 1
    q = normal(0, b, queries, n, h, dtype=dtype)
    table = np.random.default_rng(1).permutation(count)[: b * width].reshape(b, width)
    filled = np.zeros((count, slots), bool)
    for row, length in zip(table, lengths):
        for i in range(length):
            filled[row[i // slots], i % slots] = True
    values = (np.asarray(normal(seed, count, k, slots, h, dtype=dtype)) for seed in (2, 3))
    nan = np.asarray(np.nan, dtype)
    pages = (jnp.asarray(np.where(filled[:, None, :, None], x, nan)) for x in values)
    return q, *pages, jnp.asarray(table), jnp.array(lengths)


@functools.cache
def jitted(implementation, **options):
    """Shared by calls of the same options and shapes."""
    return jit(functools.partial(paged_attention, implementation=implementation, **options))


def compare(arguments, options=None, scales=None, **interpret):
    """Compares with the reference."""
    options, scales = options or {}, scales or {}
    with interpreted(**interpret):
        got = jitted("tpu", **options)(*arguments, **scales)
    want = jitted("reference", **options)(*arguments, **scales)
    assert got.dtype == want.dtype == arguments[0].dtype
    got, want = float32(got, want)
    dtype, h = arguments[0].dtype, arguments[0].shape[-1]
    slots = arguments[3].shape[1] * arguments[1].shape[2]
    score = 4.0  # of normal queries and keys, scaled; one in 20,000 is larger
    # Weights and results are rounded to the dtype, in kernel and reference.
    roundings = 0 if dtype == jnp.float32 else 3
    atol = tolerance.of_chain(want, slots, h * score**2, roundings=roundings, dtype=dtype)
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("lengths", [[40, 0, 3], [48, 17, 9], [5, 33, 2]], ids=str)
def test_equals_the_reference(lengths):
    """Empty sequences, sequences shorter than a page, odd numbers of them. Slots without a token
    hold NaN."""
    compare(cache(lengths))


@pytest.mark.parametrize(
    ("lengths", "queries", "options"),
    [
        ([48, 1], 3, {"window": 10, "softcap": 5.0, "scale": 0.5}),
        pytest.param([48, 17], 3, {"window": 10, "softcap": 5.0}, marks=pytest.mark.slow),
        pytest.param([5, 48, 2, 33], 4, {"window": 3, "scale": 0.5}, marks=pytest.mark.slow),
        pytest.param([9], 1, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_options(lengths, queries, options):
    """Sequences shorter than the queries; pages before the window are not read."""
    compare(cache(lengths, queries), options)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 10, "sink_tokens": 3, "softcap": 5.0, "return_lse": True},
        {"window": 3, "sink_tokens": 17, "sinks": True},
        {"alibi": True, "sinks": True, "return_lse": True},
        {"window": 11, "scale": 0.5},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("lengths", [[48, 1, 20], [0, 9]], ids=str)
def test_a_page_at_a_time_equals_the_reference(options, lengths):
    arguments = cache(lengths, queries=3)
    arrays = {name: normal(7, 4) for name in ("sinks", "alibi") if options.get(name)}
    static = {name: value for name, value in options.items() if name not in arrays}
    got, want = (
        jax.tree.leaves(jitted(form, **static)(*arguments, **arrays))
        for form in ("gpu", "reference")
    )
    for one, other in zip(got, want, strict=True):
        atol = tolerance.of_chain(other, 48, 16 * 4.0**2)
        live = np.abs(other) < 1e20  # lse of queries without keys is -1e30
        np.testing.assert_array_equal(one[~live], other[~live])
        np.testing.assert_allclose(one[live], other[live], rtol=0, atol=atol)


def test_a_sequence_does_not_depend_on_the_others():
    """Bit for bit, also with a longer one that needs more pages."""
    q, k, v, table, lengths = cache([12, 48, 7, 30])
    run = jitted("gpu", window=9)
    together = run(q, k, v, table, lengths)
    others = run(q, k, v, table, jnp.array([12, 3, 7, 0]))
    np.testing.assert_array_equal(together[jnp.array([0, 2])], others[jnp.array([0, 2])])


def test_the_reference_is_attention_over_the_sequence():
    q, k, v, table, lengths = cache([40, 21], queries=2)
    got = jitted("reference", window=9)(q, k, v, table, lengths)
    attend = jit(functools.partial(whole.flash_attention, window=9))
    for b, length in enumerate([40, 21]):
        pages = (np.asarray(x)[np.asarray(table[b])] for x in (k, v))
        row = [x.swapaxes(1, 2).reshape(1, -1, 2, 16)[:, :length] for x in pages]
        padded = np.zeros((1, length, 4, 16), np.float32)
        padded[:, -2:] = q[b]
        want = attend(padded, *row)[0][0, -2:]
        atol = tolerance.of_chain(want, length, 16 * 4.0**2)
        np.testing.assert_allclose(got[b], want, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [(4, 4), (6, 1)])
def test_head_groups(n, k):
    compare(cache([40, 7], n=n, k=k))


@pytest.mark.slow
def test_bfloat16():
    compare(cache([40, 7], slots=16, width=3, dtype=jnp.bfloat16))


@pytest.mark.parametrize(
    ("queries", "pages"),
    [
        (jnp.float32, jnp.bfloat16),
        pytest.param(jnp.bfloat16, jnp.float32, marks=pytest.mark.slow),
    ],
    ids=lambda dtype: dtype.__name__,
)
def test_pages_of_another_dtype(queries, pages):
    """Are rounded to the dtype of the queries where they are read."""
    q, *rest = cache([40, 7], slots=16, width=3, dtype=pages)
    compare((q.astype(queries), *rest))
    converted = (q.astype(queries), *(x.astype(queries) for x in rest[:2]), *rest[2:])
    for form in ("gpu", "reference"):
        mixed, same = (jitted(form)(*each) for each in ((q.astype(queries), *rest), converted))
        np.testing.assert_array_equal(*float32(mixed, same))


@pytest.mark.parametrize(
    "dtype",
    [
        jnp.int8,
        pytest.param(jnp.float8_e4m3fn, marks=pytest.mark.slow),
        pytest.param(jnp.float8_e5m2, marks=pytest.mark.slow),
    ],
)
def test_quantized_pages(dtype):
    shape = 7, 2, 128, 16
    k, v = (integers(seed, -127, 128, *shape, dtype=dtype) for seed in (1, 2))
    scales = {
        f"{name}_scales_pks": uniform(seed, *shape[:3]) / 64 for seed, name in ((3, "k"), (4, "v"))
    }
    table = jnp.array([[6, 2], [1, 5], [0, 0]])
    compare((normal(0, 3, 1, 4, 16), k, v, table, jnp.array([200, 131, 0])), scales=scales)


@pytest.mark.slow
def test_has_no_race(capfd):
    compare(cache([40, 0, 17, 3]), detect_races=True)
    assert "race" not in capfd.readouterr().out.lower()


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
        compare(cache(lengths, queries), {"window": window, "softcap": softcap})


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({1: np.zeros((7, 3, 8, 16)), 2: np.zeros((7, 3, 8, 16))}, {}, "4 query heads must be a"),
        ({2: np.zeros((7, 2, 8, 8))}, {}, "must have the same shape and dtype"),
        ({3: np.zeros((1, 6))}, {}, "table_bp is float"),
        ({4: np.zeros((2,), int)}, {}, "lengths_b"),
        ({0: np.zeros((1, 1, 4, 16), np.int8)}, {}, "q_btnh is int8; it must be"),
        ({1: np.zeros((7, 2, 8, 16), int), 2: np.zeros((7, 2, 8, 16), int)}, {}, "pages are int"),
        ({}, {"window": 0}, "window=0"),
        ({}, {"softcap": 0.0}, "softcap=0.0"),
        ({}, {"k_scales_pks": np.ones((7, 2, 8))}, "need pages of int8 or float8"),
        ({}, {"implementation": "hopper"}, "'hopper' is not one of 'tpu', 'gpu', 'reference'"),
    ],
)
def test_rejects_arguments_that_do_not_fit(change, options, words):
    arguments = list(cache([5]))
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(ValueError, match=words):
        paged_attention(*arguments, **options)


def test_a_tpu_needs_whole_registers():
    words = "pages have 4 slots of float32; the number of slots must be a multiple of 8"
    with pytest.raises(ValueError, match=words):
        paged_attention(*cache([5], slots=4), implementation="tpu")
