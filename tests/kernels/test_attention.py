"""Attention in blocks equals its specification, values and gradients, for every option."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from jax.sharding import Mesh, PartitionSpec
from kernel_helpers import float32, jit, normal, uniform

from kernels_pallas import flash_attention
from kernels_pallas.attention import blocked, op, reference

B, H = 2, 8


def inputs(t, s, n, k):
    """q, k, v, sinks and alibi. Queries are scaled so that the softmax is neither flat nor
    one-hot."""
    q, keys, values = 2 * normal(0, B, t, n, H), normal(1, B, s, k, H), normal(2, B, s, k, H)
    return q, keys, values, normal(3, n), uniform(4, n)


SEGMENTS = np.array([[1] * 5 + [2] * 9 + [3] * 3, [1] * 17])
POSITIONS = np.array([[3, 4, 5, 6, 7], [9, 10, 11, 12, 13]])

# name: (T, S, N, K, options)
CASES = {
    "causal": (17, 17, 4, 4, {}),
    "full": (17, 17, 4, 4, {"causal": False}),
    "grouped": (17, 17, 6, 2, {}),
    "multi_query": (16, 16, 3, 1, {}),
    "scale": (17, 17, 4, 2, {"scale": 0.7}),
    "window": (17, 17, 4, 2, {"window": 4}),
    "window_of_one": (17, 17, 4, 2, {"window": 1}),
    "window_and_sink_tokens": (17, 17, 4, 2, {"window": 4, "sink_tokens": 2}),
    "segments": (17, 17, 4, 2, {"segment_ids": SEGMENTS}),
    "segments_full": (17, 17, 4, 2, {"segment_ids": SEGMENTS, "causal": False}),
    "segments_window": (17, 17, 4, 2, {"segment_ids": SEGMENTS, "window": 3, "sink_tokens": 1}),
    "positions": (5, 16, 4, 2, {"positions": POSITIONS}),
    "positions_window": (5, 16, 4, 2, {"positions": POSITIONS, "window": 3}),
    "decode": (1, 16, 6, 2, {"positions": np.array([[0], [15]])}),
    "positions_segments": (
        5, 17, 4, 2,
        {"positions": POSITIONS, "segment_ids": SEGMENTS[:, 3:8], "kv_segment_ids": SEGMENTS},
    ),
    "nothing_visible": (
        5, 17, 4, 2,
        {"positions": POSITIONS, "segment_ids": np.full((B, 5), 7), "kv_segment_ids": SEGMENTS},
    ),
    "softcap": (17, 17, 4, 2, {"softcap": 1.5}),
    "sinks": (17, 17, 6, 2, {"sinks": True}),
    "alibi": (17, 17, 6, 2, {"alibi": True}),
    "alibi_full": (17, 17, 6, 2, {"alibi": True, "causal": False}),
    "prefix": (17, 17, 4, 2, {"prefix": 7}),
    "prefix_by_row": (17, 17, 4, 2, {"prefix": np.array([3, 12]), "window": 4}),
    "prefix_segments": (17, 17, 4, 2, {"prefix": 4, "segment_ids": SEGMENTS}),
    "cross": (5, 17, 4, 2, {"causal": False}),
    "everything": (
        17, 17, 6, 2,
        {
            "window": 5, "sink_tokens": 2, "prefix": 3, "segment_ids": SEGMENTS, "softcap": 2.0,
            "sinks": True, "alibi": True,
        },
    ),
}  # fmt: skip


# The slow cases differ from a quick one in lengths, heads or the combination of options.
QUICK = ("causal", "full", "window", "positions", "everything")
# Chunk by chunk, for packed documents; sinks are not supported.
CHUNKED = {name: case for name, case in CASES.items() if "segment_ids" in case[4]} | {
    "packed_alibi": (
        17, 17, 6, 2, {"segment_ids": SEGMENTS, "alibi": True, "softcap": 2.0, "window": 5},
    )
}  # fmt: skip
QUICK_CHUNKED = ("positions_segments", "everything", "packed_alibi")


def parametrized(names, quick):
    """Marks all names but those in `quick` as slow."""
    slow = (pytest.param(name, marks=pytest.mark.slow) for name in names if name not in quick)
    return pytest.mark.parametrize("name", [*quick, *slow])


def arrays_of(t, s, n, k, options):
    """Differentiable arguments by name."""
    q, keys, values, sinks, alibi = inputs(t, s, n, k)
    arrays = {"q": q, "k": keys, "v": values}
    if options.get("sinks"):
        arrays["sinks"] = sinks
    if options.get("alibi"):
        arrays["alibi"] = alibi
    return arrays


def value_and_gradients(function, options, arrays):
    """Output, log-sum-exp, and the gradients of a fixed random projection of both."""
    options = {name: value for name, value in options.items() if name not in ("sinks", "alibi")}

    def projected(arrays):
        extra = {name: arrays.get(name) for name in ("sinks", "alibi")}
        out, lse = function(arrays["q"], arrays["k"], arrays["v"], **options, **extra)
        toward = normal(9, *out.shape)
        # Rows without visible keys have an lse of -1e30, which would dwarf the other terms.
        visible_lse = jnp.where(lse > -1e29, lse, 0)
        value = jnp.sum(out.astype(jnp.float32) * toward) + jnp.sum(visible_lse * toward[..., 0])
        return value, (out, lse)

    gradients, (out, lse) = jax.grad(projected, has_aux=True)(arrays)
    return {"out": out, "lse": lse} | gradients


@functools.cache
def specified(name):
    """Results of the specification."""
    *shape, options = CHUNKED.get(name) or CASES[name]
    run = partial(value_and_gradients, reference.flash_attention, options)
    return jit(run)(arrays_of(*shape, options))


def largest_score(q_btnh, k_bskh, scale=None, **_):
    """Largest magnitude of the scores before a soft cap."""
    q, keys = np.asarray(q_btnh), np.asarray(k_bskh)
    (b, t, n, h), k = q.shape, keys.shape[2]
    scores = np.einsum("btkgh,bskh->bkgts", q.reshape(b, t, k, n // k, h), keys)
    return tolerance.largest(scores) * (scale or h**-0.5)


def compare(results, want, arrays, options):
    """Compares results with those of the specification."""
    t, s, h = arrays["q"].shape[1], *arrays["k"].shape[1::2]
    # The sums over keys and of a score, whose error the exponential amplifies.
    score = h * largest_score(arrays["q"], arrays["k"], **options) ** 2
    # Gradients of scores are differences of two sums over the head width.
    sums = {"out": (s, score), "lse": (s, score), "v": (t, s, score)}
    sums |= dict.fromkeys(("q", "k"), (s, t, score, h, h))
    sums |= dict.fromkeys(("sinks", "alibi"), (B * t * s, score, h, h))
    for name, expected in want.items():
        visible = np.where(np.asarray(expected) < -1e29, 0, expected)
        atol = tolerance.of_chain(visible, *sums[name])
        np.testing.assert_allclose(results[name], expected, rtol=0, atol=atol, err_msg=name)


with_lse = partial(flash_attention, return_lse=True)


@parametrized(CASES, QUICK)
def test_equals_the_specification(name, monkeypatch):
    *shape, options = CASES[name]
    # Blocks of 4 queries, so that every section has several, and the last is not full.
    monkeypatch.setitem(op.BLOCK, "cpu", 4)
    monkeypatch.setattr(blocked, "SECTIONS", 2)
    arrays = arrays_of(*shape, options)
    got = jit(partial(value_and_gradients, with_lse, options))(arrays)
    compare(got, specified(name), arrays, options)


@parametrized(CHUNKED, QUICK_CHUNKED)
def test_chunk_by_chunk_equals_the_specification(name, monkeypatch):
    *shape, options = CHUNKED[name]
    monkeypatch.setattr(blocked, "CHUNK", 4)
    calls = []
    monkeypatch.setattr(
        blocked, "_reach", lambda *a, reach=blocked._reach: calls.append(a) or reach(*a)
    )
    arrays = arrays_of(*shape, options)
    function = partial(with_lse, implementation="reference")
    got = jit(partial(value_and_gradients, function, options))(arrays)
    assert bool(calls) == ("sinks" not in options)
    compare(got, specified(name), arrays, options)


def squared(function):
    """Jitted gradients (dq, dk, dv) of the sum of squares of the output."""
    return jit(jax.grad(lambda *a: jnp.sum(function(*a) ** 2), (0, 1, 2)))


def compare_squared(got, want, q, k):
    """Compares gradients of `squared`."""
    (t, h), s = q.shape[1::2], k.shape[1]
    score = h * largest_score(q, k) ** 2
    for a, b in zip(got, want, strict=True):
        atol = tolerance.of_chain(b, s, s, t, score, h, h)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.slow
def test_chunk_by_chunk_inside_shard_map(monkeypatch):
    monkeypatch.setattr(blocked, "CHUNK", 4)
    q, k, v, *_ = inputs(17, 17, 4, 2)
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    rows = PartitionSpec("x")
    function = partial(flash_attention, implementation="reference")
    mapped = jax.shard_map(
        lambda q, k, v, ids: function(q, k, v, segment_ids=ids),
        mesh=mesh,
        in_specs=(rows,) * 4,
        out_specs=rows,
    )
    got = squared(lambda *a: mapped(*a, SEGMENTS))(q, k, v)
    want = squared(lambda *a: reference.flash_attention(*a, segment_ids=SEGMENTS)[0])(q, k, v)
    compare_squared(got, want, q, k)


def test_number_of_chunks_grows_with_the_documents_not_with_the_row():
    def chunks(length, document):
        @jit
        def reach(ids):
            options = op.Options(True, None, 0, None, 1.0)
            extras = op.Extras(ids, ids, *[None] * 5)
            return blocked._reach(options, extras, length, length)

        low, high = reach(np.arange(length)[None] // document)
        return int(np.sum(np.asarray(high) - np.asarray(low)))

    blocks = 16
    length = blocks * blocked.CHUNK
    assert chunks(length, length) == blocks * (blocks + 1) // 2
    # A document of two blocks: the first attends to one chunk, the second to both.
    assert chunks(length, 2 * blocked.CHUNK) == 3 * blocks // 2
    # Documents that end within a block.
    assert chunks(length, 700) < 3 * blocks


def test_rows_without_visible_keys_are_zero_and_have_no_gradient():
    t, s, n, k, options = CASES["nothing_visible"]
    run = jit(partial(value_and_gradients, with_lse, options))
    for name, leaf in run(arrays_of(t, s, n, k, options)).items():
        np.testing.assert_array_equal(leaf, np.float32(-1e30 if name == "lse" else 0))


def test_first_tokens_are_counted_in_each_document():
    """Packed documents give the same as each document alone, with sink tokens and a prefix."""
    q, k, v, *_ = inputs(17, 17, 4, 2)
    attend = jit(partial(flash_attention, window=3, sink_tokens=2, prefix=2))
    packed = attend(q, k, v, segment_ids=SEGMENTS)
    for low, high in ((0, 5), (5, 14)):
        alone = attend(*(x[:1, low:high] for x in (q, k, v)))
        atol = tolerance.of_chain(alone, 17, H * largest_score(q, k) ** 2)
        np.testing.assert_allclose(packed[:1, low:high], alone, rtol=0, atol=atol)


def test_the_log_sum_exp_merges_parts():
    """Softmax over two halves of the keys, weighted by their log-sum-exp, is softmax over all."""
    q, k, v, *_ = inputs(17, 34, 4, 2)
    attend = jit(partial(with_lse, causal=False))
    halves = [attend(q, k[:, part], v[:, part]) for part in (slice(0, 17), slice(17, 34))]
    whole, lse = attend(q, k, v)
    score = H * largest_score(q, k) ** 2
    merged_lse = np.logaddexp(halves[0][1], halves[1][1])
    atol = tolerance.of_chain(lse, 34, score)
    np.testing.assert_allclose(merged_lse, lse, rtol=0, atol=atol)
    merged = sum(out * np.exp(part - lse)[..., None] for out, part in halves)
    atol = tolerance.of_chain(whole, 34, score)
    np.testing.assert_allclose(merged, whole, rtol=0, atol=atol)


def test_gradients_reach_neither_later_keys_nor_other_documents():
    q, k, v, *_ = inputs(17, 17, 4, 2)
    row = 8  # of document 2, which starts at 5

    @jit
    @partial(jax.grad, argnums=(0, 1))
    def gradients(k, v):
        return flash_attention(q, k, v, segment_ids=SEGMENTS)[0, row].sum()

    for gradient in gradients(k, v):
        visible = np.flatnonzero(np.abs(gradient[0]).sum((1, 2)))
        np.testing.assert_array_equal(visible, np.arange(5, row + 1))


def test_bfloat16():
    q, k, v, *_ = inputs(17, 17, 4, 2)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out = jit(flash_attention)(*low)
    assert out.dtype == jnp.bfloat16
    exact = float32(*low)
    want, _ = jit(reference.flash_attention)(*exact)
    # Weights and output are rounded.
    atol = tolerance.of_chain(
        want, 17, H * largest_score(*exact[:2]) ** 2, roundings=2, dtype=jnp.bfloat16
    )
    np.testing.assert_allclose(*float32(out, want), rtol=0, atol=atol)


def test_under_vmap_and_checkpoint():
    q, k, v, *_ = inputs(17, 17, 4, 2)
    stacked = [np.stack([x, x + np.float32(0.1)]) for x in (q, k, v)]
    gradients = jax.grad(lambda *a: jnp.sum(jax.checkpoint(flash_attention)(*a) ** 2), (0, 1, 2))
    got = jit(jax.vmap(gradients))(*stacked)
    want = squared(lambda *a: reference.flash_attention(*a)[0])
    for i in range(2):
        arrays = [x[i] for x in stacked]
        compare_squared([x[i] for x in got], want(*arrays), *arrays[:2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"causal": False, "window": 3}, "window=3 needs causal=True"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"sink_tokens": 2}, "sink_tokens=2 has no effect without a window"),
        ({"causal": False, "prefix": 3}, "prefix has no effect without causal=True"),
        ({"prefix": np.zeros(5, int)}, r"prefix has shape \(5,\)"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"sinks": np.zeros(3)}, r"sinks has shape \(3,\)"),
        ({"kv_segment_ids": SEGMENTS}, "kv_segment_ids needs segment_ids"),
        ({"q_btnh": np.zeros((B, 17, 3, H))}, "3 query heads must be a multiple of 2"),
        ({"q_btnh": np.zeros((B, 5, 4, H))}, "pass positions"),
        ({"q_btnh": np.zeros((B, 17, 4, 4))}, "head width"),
        ({"implementation": "tpu", "alibi": np.ones(4)}, "'tpu' does not support alibi"),
        ({"implementation": "tpu", "q_btnh": np.zeros((B, 17, 4, H), np.float16)}, "in float16"),
        ({"implementation": "mosaic"}, "implementation='mosaic' is not one of"),
    ],
)  # fmt: skip
def test_rejects_arguments_that_do_not_fit(change, words):
    q, k, v, *_ = inputs(17, 17, 4, 2)
    with pytest.raises(ValueError, match=words):
        flash_attention(**({"q_btnh": q, "k_bskh": k, "v_bskh": v} | change))


def gradient_memory(length, options):
    """Bytes of temporaries of the compiled gradients."""
    q, k, v, *_ = inputs(length, length, 2, 1)
    run = squared(partial(flash_attention, **options))
    return run.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes


def in_chunks(length):
    return {"segment_ids": np.ones((B, length), int), "implementation": "reference"}


@pytest.mark.slow
@pytest.mark.parametrize("chunked", [False, True])
def test_memory_is_far_below_that_of_all_scores(chunked, monkeypatch):
    monkeypatch.setattr(blocked, "SECTIONS", 2)
    length = 4096
    scores = 4 * B * 2 * length**2  # bytes
    assert gradient_memory(length, in_chunks(length) if chunked else {}) < scores / 12


@pytest.mark.slow
def test_memory_grows_linearly_with_the_length():
    # At four times the length, blocks of scores and inputs are 4 times as large, T * T 16 times.
    assert gradient_memory(4096, {}) < 6 * gradient_memory(1024, {})


@pytest.mark.slow
def test_memory_of_chunks_does_not_grow_with_the_length():
    # Only the inputs and their gradients grow; here they are 8 numbers wide.
    assert gradient_memory(8192, in_chunks(8192)) < 2 * gradient_memory(2048, in_chunks(2048))


@pytest.mark.slow
def test_work_of_a_window_does_not_grow_with_the_length():
    """Counts the operations of one block in the compiled program."""

    def flops_of_a_block(length):
        q, k, v, *_ = inputs(length, length, 2, 1)
        compiled = jit(lambda *a: flash_attention(*a, window=16)).lower(q, k, v).compile()
        # XLA counts the body of a loop once; the body is one block.
        return compiled.cost_analysis()["flops"]

    assert flops_of_a_block(2048) < 1.5 * flops_of_a_block(512)
