"""Attention equals its specification, values and gradients, for every option, and refuses in
words."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas import flash_attention
from kernels_pallas.attention import blocked, op, reference

B, H = 2, 8


def inputs(t, s, n, k, seed=0):
    """q, k, v and the optional arrays, of a size at which the softmax is neither flat nor
    one-hot."""
    keys = jax.random.split(jax.random.key(seed), 6)
    q = 2 * jax.random.normal(keys[0], (B, t, n, H))
    kv = [jax.random.normal(key, (B, s, k, H)) for key in keys[1:3]]
    return q, *kv, jax.random.normal(keys[3], (n,)), jax.random.uniform(keys[4], (n,))


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


def call(function, arrays, options):
    """(out, lse) of the op or the reference for the arrays that it can be differentiated by."""
    options = {name: value for name, value in options.items() if name not in ("sinks", "alibi")}
    options |= {name: arrays.get(name) for name in ("sinks", "alibi")}
    return function(arrays["q"], arrays["k"], arrays["v"], **options)


def arrays_of(t, s, n, k, options):
    q, key, value, sinks, alibi = inputs(t, s, n, k)
    arrays = {"q": q, "k": key, "v": value}
    if options.get("sinks"):
        arrays["sinks"] = sinks
    if options.get("alibi"):
        arrays["alibi"] = alibi
    return arrays


def value_and_gradients(function, arrays, options):
    """Output, log-sum-exp, and the gradients of a fixed random projection of both."""

    def projected(arrays):
        out, lse = call(function, arrays, options)
        toward = jax.random.normal(jax.random.key(9), out.shape)
        # A row that sees nothing has an lse of -1e30, beside which the rest would be lost.
        seen = jnp.where(lse > -1e29, lse, 0)
        return jnp.sum(out.astype(jnp.float32) * toward) + jnp.sum(seen * toward[..., 0]), (
            out,
            lse,
        )

    (_, (out, lse)), gradients = jax.value_and_grad(projected, has_aux=True)(arrays)
    return {"out": out, "lse": lse} | gradients


with_lse = partial(flash_attention, return_lse=True)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_specification(name, monkeypatch):
    *shape, options = CASES[name]
    # Blocks of 4 queries, so that every section has several, and the last is not full.
    monkeypatch.setitem(op.BLOCK, "cpu", 4)
    monkeypatch.setattr(blocked, "SECTIONS", 2)

    @jax.jit
    def both(arrays):
        return [
            value_and_gradients(function, arrays, options)
            for function in (with_lse, reference.flash_attention)
        ]

    got, want = both(arrays_of(*shape, options))
    for leaf in want:
        # Sums of at most 17 x 17 x 8 numbers around 1 in float32 (eps 1e-7), in another order.
        np.testing.assert_allclose(got[leaf], want[leaf], atol=1e-5, rtol=1e-5, err_msg=leaf)


# A softmax with sinks is not met in chunks.
PACKED = [name for name, case in CASES.items() if "segment_ids" in case[4]]


@pytest.mark.parametrize("name", [*PACKED, "packed_alibi"])
def test_chunk_by_chunk_equals_the_specification(name, monkeypatch):
    alibi = {"segment_ids": SEGMENTS, "alibi": True, "softcap": 2.0, "window": 5}
    *shape, options = CASES.get(name, (17, 17, 6, 2, alibi))
    monkeypatch.setattr(blocked, "CHUNK", 4)
    met = []
    monkeypatch.setattr(
        blocked, "_reach", lambda *a, reach=blocked._reach: met.append(a) or reach(*a)
    )

    @jax.jit
    def both(arrays):
        ours = partial(with_lse, implementation="reference")
        return [
            value_and_gradients(function, arrays, options)
            for function in (ours, reference.flash_attention)
        ]

    got, want = both(arrays_of(*shape, options))
    assert bool(met) == ("sinks" not in options)
    for leaf in want:
        np.testing.assert_allclose(got[leaf], want[leaf], atol=1e-5, rtol=1e-5, err_msg=leaf)


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

    def gradients(function):
        return jax.jit(jax.grad(lambda *a: jnp.sum(function(*a) ** 2), (0, 1, 2)))(q, k, v)

    got = gradients(lambda *a: mapped(*a, SEGMENTS))
    want = gradients(lambda *a: reference.flash_attention(*a, segment_ids=SEGMENTS)[0])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def test_chunks_met_grow_with_the_documents_and_not_with_the_row():
    def met(length, document):
        ids = jnp.arange(length)[None] // document
        options = op.Options(True, None, 0, None, 1.0)
        extras = op.Extras(ids, ids, *[None] * 5)
        low, high = blocked._reach(options, extras, length, length)
        return int(jnp.sum(high - low))

    blocks = 32
    length = blocks * blocked.CHUNK
    assert met(length, length) == blocks * (blocks + 1) // 2
    # A document of two blocks: the first meets one chunk, the second both.
    assert met(length, 2 * blocked.CHUNK) == 3 * blocks // 2
    # Edges within blocks, and ids of both rows decide.
    assert met(length, 700) < 3 * blocks


def test_rows_that_see_nothing_are_zero_and_have_no_gradient():
    t, s, n, k, options = CASES["nothing_visible"]
    results = value_and_gradients(with_lse, arrays_of(t, s, n, k, options), options)
    for name, leaf in results.items():
        np.testing.assert_array_equal(leaf, np.float32(-1e30 if name == "lse" else 0))


def test_first_tokens_are_those_of_each_document():
    """Packed documents give what each gives alone, first tokens and prefix included."""
    q, k, v, *_ = inputs(17, 17, 4, 2)
    options = {"window": 3, "sink_tokens": 2, "prefix": 2}
    packed = flash_attention(q, k, v, segment_ids=SEGMENTS, **options)
    for low, high in ((0, 5), (5, 14), (14, 17)):
        alone = flash_attention(*(x[:1, low:high] for x in (q, k, v)), **options)
        np.testing.assert_allclose(packed[:1, low:high], alone, atol=1e-5)


def test_the_log_sum_exp_merges_parts():
    """Softmax over two halves of the keys, weighted by their log-sum-exp, is softmax over all."""
    q, k, v, *_ = inputs(17, 34, 4, 2)
    halves = [
        flash_attention(q, k[:, part], v[:, part], causal=False, return_lse=True)
        for part in (slice(0, 17), slice(17, 34))
    ]
    whole, lse = flash_attention(q, k, v, causal=False, return_lse=True)
    np.testing.assert_allclose(jnp.logaddexp(halves[0][1], halves[1][1]), lse, atol=1e-5)
    merged = sum(out * jnp.exp(part - lse)[..., None] for out, part in halves)
    np.testing.assert_allclose(merged, whole, atol=1e-5)


def test_no_later_key_and_no_other_document_is_read():
    q, k, v, *_ = inputs(17, 17, 4, 2)
    row = 8  # of document 2, which starts at 5

    def out_row(k, v):
        return flash_attention(q, k, v, segment_ids=SEGMENTS)[0, row].sum()

    for gradient in jax.grad(out_row, (0, 1))(k, v):
        read = np.flatnonzero(np.abs(gradient[0]).sum((1, 2)))
        np.testing.assert_array_equal(read, np.arange(5, row + 1))


def test_bfloat16_stays_bfloat16_and_near():
    q, k, v, *_ = inputs(17, 17, 4, 2)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out = flash_attention(*low)
    assert out.dtype == jnp.bfloat16
    # Weights and output are rounded to 8 bits: 2**-8 relative each, on averages of values below 4.
    want, _ = reference.flash_attention(*(x.astype(jnp.float32) for x in low))
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.03)


def test_under_vmap_and_checkpoint():
    q, k, v, *_ = inputs(17, 17, 4, 2)
    stacked = [jnp.stack([x, x + 0.1]) for x in (q, k, v)]

    def loss(q, k, v):
        return jnp.sum(jax.checkpoint(flash_attention)(q, k, v) ** 2)

    got = jax.vmap(jax.grad(loss, (0, 1, 2)))(*stacked)
    want = jax.grad(lambda q, k, v: jnp.sum(reference.flash_attention(q, k, v)[0] ** 2), (0, 1, 2))
    for i in range(2):
        for a, b in zip(got, want(*(x[i] for x in stacked)), strict=True):
            np.testing.assert_allclose(a[i], b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"causal": False, "window": 3}, "window=3 needs causal=True"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"sink_tokens": 2}, "sink_tokens=2 does nothing without a window"),
        ({"causal": False, "prefix": 3}, "prefix does nothing without causal=True"),
        ({"prefix": np.zeros(5, int)}, r"prefix has shape \(5,\)"),
        ({"softcap": 0.0}, "softcap=0.0 must be above zero"),
        ({"sinks": np.zeros(3)}, r"sinks has shape \(3,\)"),
        ({"kv_segment_ids": SEGMENTS}, "kv_segment_ids needs segment_ids"),
        ({"q_btnh": np.zeros((B, 17, 3, H))}, "3 query heads do not divide into 2"),
        ({"q_btnh": np.zeros((B, 5, 4, H))}, "give positions"),
        ({"q_btnh": np.zeros((B, 17, 4, 4))}, "head width"),
        ({"implementation": "tpu", "alibi": np.ones(4)}, "'tpu' has no alibi"),
        ({"implementation": "tpu", "q_btnh": np.zeros((B, 17, 4, H), np.float16)}, "in float16"),
        ({"implementation": "mosaic"}, "implementation='mosaic' is not one of"),
    ],
)  # fmt: skip
def test_refuses_in_words(change, words):
    q, k, v, *_ = inputs(17, 17, 4, 2)
    with pytest.raises(ValueError, match=words):
        flash_attention(**({"q_btnh": q, "k_bskh": k, "v_bskh": v} | change))


def test_memory_grows_with_the_length_and_not_its_square():
    def gradient_memory(length):
        q, k, v, *_ = inputs(length, length, 2, 1)

        def loss(q, k, v):
            return jnp.sum(flash_attention(q, k, v) ** 2)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Four times the length: four times the blocks' scores and inputs, where the square would be 16.
    assert gradient_memory(4096) < 6 * gradient_memory(1024)


def test_in_chunks_scores_do_not_grow_with_the_length():
    def gradient_memory(length):
        q, k, v, *_ = inputs(length, length, 2, 1)
        options = {"segment_ids": np.ones((B, length), int), "implementation": "reference"}

        def loss(q, k, v):
            return jnp.sum(flash_attention(q, k, v, **options) ** 2)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # What grows are the inputs and their gradients, 8 numbers wide here.
    assert gradient_memory(8192) < 2 * gradient_memory(2048)


def test_a_window_reads_only_the_keys_in_reach():
    """The products of a block and its window, counted in the compiled program, do not grow with the
    sequence."""

    def flops_of_a_block(length):
        q, k, v, *_ = inputs(length, length, 2, 1)
        compiled = jax.jit(lambda *a: flash_attention(*a, window=16)).lower(q, k, v).compile()
        # XLA counts the body of a loop once, and here the body is one block.
        return compiled.cost_analysis()["flops"]

    assert flops_of_a_block(2048) < 1.5 * flops_of_a_block(512)
