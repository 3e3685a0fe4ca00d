"""Attention equals its specification, values and gradients, for every option, and refuses in
words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import attention
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
    "segments": (17, 17, 4, 2, {"segments_bt": SEGMENTS}),
    "segments_full": (17, 17, 4, 2, {"segments_bt": SEGMENTS, "causal": False}),
    "segments_window": (17, 17, 4, 2, {"segments_bt": SEGMENTS, "window": 3, "sink_tokens": 1}),
    "positions": (5, 16, 4, 2, {"positions_bt": POSITIONS}),
    "positions_window": (5, 16, 4, 2, {"positions_bt": POSITIONS, "window": 3}),
    "decode": (1, 16, 6, 2, {"positions_bt": np.array([[0], [15]])}),
    "positions_segments": (
        5, 17, 4, 2,
        {"positions_bt": POSITIONS, "segments_bt": SEGMENTS[:, 3:8], "kv_segments_bs": SEGMENTS},
    ),
    "nothing_visible": (
        5, 17, 4, 2,
        {"positions_bt": POSITIONS, "segments_bt": np.full((B, 5), 7), "kv_segments_bs": SEGMENTS},
    ),
    "softcap": (17, 17, 4, 2, {"softcap": 1.5}),
    "sinks": (17, 17, 6, 2, {"sinks": True}),
    "alibi": (17, 17, 6, 2, {"alibi": True}),
    "alibi_full": (17, 17, 6, 2, {"alibi": True, "causal": False}),
    "everything": (
        17, 17, 6, 2,
        {
            "window": 5, "sink_tokens": 2, "segments_bt": SEGMENTS, "softcap": 2.0,
            "sinks": True, "alibi": True,
        },
    ),
}  # fmt: skip


def call(function, arrays, options):
    """The op or the reference with the arrays it can be differentiated by, as {name: array}."""
    options = {name: value for name, value in options.items() if name not in ("sinks", "alibi")}
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    return function(q, k, v, sinks_n=arrays.get("sinks"), alibi_n=arrays.get("alibi"), **options)


def arrays_of(t, s, n, k, options):
    q, key, value, sinks, alibi = inputs(t, s, n, k)
    arrays = {"q": q, "k": key, "v": value}
    if options.get("sinks"):
        arrays["sinks"] = sinks
    if options.get("alibi"):
        arrays["alibi"] = alibi
    return arrays


def value_and_gradients(function, arrays, options):
    """Output, and the gradients of a fixed random projection of it."""

    def projected(arrays):
        out = call(function, arrays, options)
        toward = jax.random.normal(jax.random.key(9), out.shape)
        return jnp.sum(out.astype(jnp.float32) * toward), out

    (_, out), gradients = jax.value_and_grad(projected, has_aux=True)(arrays)
    return {"out": out} | gradients


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
            for function in (attention, reference.attention)
        ]

    got, want = both(arrays_of(*shape, options))
    for leaf in want:
        # Sums of at most 17 x 17 x 8 numbers around 1 in float32 (eps 1e-7), in another order.
        np.testing.assert_allclose(got[leaf], want[leaf], atol=1e-5, rtol=1e-5, err_msg=leaf)


def test_rows_that_see_nothing_are_zero_and_have_no_gradient():
    t, s, n, k, options = CASES["nothing_visible"]
    results = value_and_gradients(attention, arrays_of(t, s, n, k, options), options)
    for leaf in results.values():
        np.testing.assert_array_equal(leaf, 0)


def test_no_later_key_and_no_other_document_is_read():
    q, k, v, *_ = inputs(17, 17, 4, 2)
    row = 8  # of document 2, which starts at 5

    def out_row(k, v):
        return attention(q, k, v, segments_bt=SEGMENTS)[0, row].sum()

    for gradient in jax.grad(out_row, (0, 1))(k, v):
        read = np.flatnonzero(np.abs(gradient[0]).sum((1, 2)))
        np.testing.assert_array_equal(read, np.arange(5, row + 1))


def test_bfloat16_stays_bfloat16_and_near():
    q, k, v, *_ = inputs(17, 17, 4, 2)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out = attention(*low)
    assert out.dtype == jnp.bfloat16
    # Weights and output are rounded to 8 bits: 2**-8 relative each, on averages of values below 4.
    want = reference.attention(*(x.astype(jnp.float32) for x in low))
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.03)


def test_under_vmap_and_checkpoint():
    q, k, v, *_ = inputs(17, 17, 4, 2)
    stacked = [jnp.stack([x, x + 0.1]) for x in (q, k, v)]

    def loss(q, k, v):
        return jnp.sum(jax.checkpoint(attention)(q, k, v) ** 2)

    got = jax.vmap(jax.grad(loss, (0, 1, 2)))(*stacked)
    want = jax.grad(lambda q, k, v: jnp.sum(reference.attention(q, k, v) ** 2), (0, 1, 2))
    for i in range(2):
        for a, b in zip(got, want(*(x[i] for x in stacked)), strict=True):
            np.testing.assert_allclose(a[i], b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"causal": False, "window": 3}, "window=3 needs causal=True"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"sink_tokens": 2}, "sink_tokens=2 does nothing without a window"),
        ({"softcap": 0.0}, "softcap=0.0 must be above zero"),
        ({"sinks_n": np.zeros(3)}, r"sinks_n has shape \(3,\)"),
        ({"kv_segments_bs": SEGMENTS}, "kv_segments_bs needs segments_bt"),
        ({"q_btnh": np.zeros((B, 17, 3, H))}, "3 query heads do not divide into 2"),
        ({"q_btnh": np.zeros((B, 5, 4, H))}, "give positions_bt"),
        ({"q_btnh": np.zeros((B, 17, 4, 4))}, "head width"),
    ],
)  # fmt: skip
def test_refuses_in_words(change, words):
    q, k, v, *_ = inputs(17, 17, 4, 2)
    with pytest.raises(ValueError, match=words):
        attention(**({"q_btnh": q, "k_bskh": k, "v_bskh": v} | change))


def test_memory_grows_with_the_length_and_not_its_square():
    def gradient_memory(length):
        q, k, v, *_ = inputs(length, length, 2, 1)

        def loss(q, k, v):
            return jnp.sum(attention(q, k, v) ** 2)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Four times the length: four times the blocks' scores and inputs, where the square would be 16.
    assert gradient_memory(4096) < 6 * gradient_memory(1024)


def test_a_window_reads_only_the_keys_in_reach():
    """The products of a block and its window, counted in the compiled program, do not grow with the
    sequence."""

    def flops_of_a_block(length):
        q, k, v, *_ = inputs(length, length, 2, 1)
        compiled = jax.jit(lambda *a: attention(*a, window=16)).lower(q, k, v).compile()
        # XLA counts the body of a loop once, and here the body is one block.
        return compiled.cost_analysis()["flops"]

    assert flops_of_a_block(2048) < 1.5 * flops_of_a_block(512)
