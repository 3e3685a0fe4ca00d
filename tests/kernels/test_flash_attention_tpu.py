"""The TPU attention kernels, in interpret mode, equal attention in blocks, which test_attention.py
compares with the specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import float32, interpreted, jit, normal

from kernels_pallas import flash_attention
from kernels_pallas.attention import tpu

B = 2
SEGMENTS = np.array([[1] * 100 + [2] * 130 + [3] * 70, [4] * 290 + [0] * 10])
POSITIONS = np.array([[3, 4, 5, 6, 7], [290, 291, 292, 293, 299]])

# name: (T, S, N, K, H, width of v, options)
CASES = {
    "causal": (300, 300, 4, 2, 64, 64, {}),
    "full": (200, 300, 4, 4, 32, 32, {"causal": False}),
    "wide_values": (300, 300, 2, 1, 48, 80, {}),
    "window": (300, 300, 4, 2, 64, 64, {"window": 70}),
    "window_and_sinks": (300, 300, 4, 2, 64, 64, {"window": 70, "sink_tokens": 3, "sinks": True}),
    "segments": (300, 300, 4, 2, 64, 64, {"segment_ids": SEGMENTS}),
    "segments_full": (300, 300, 2, 2, 64, 64, {"segment_ids": SEGMENTS, "causal": False}),
    "prefix": (300, 300, 2, 1, 64, 64, {"prefix": np.array([3, 200])}),
    "softcap": (300, 300, 2, 1, 64, 64, {"softcap": 2.0}),
    "sinks": (300, 300, 6, 2, 32, 32, {"sinks": True}),
    "decode": (5, 300, 6, 2, 64, 64, {"positions": POSITIONS}),
    "heads_share_lanes": (
        5, 300, 8, 2, 64, 64,
        {"positions": POSITIONS, "window": 250, "sink_tokens": 3, "sinks": True,
         "segment_ids": SEGMENTS[:, [99, 3, 150, 280, 299]], "kv_segment_ids": SEGMENTS},
    ),
    "few_queries": (20, 300, 8, 1, 32, 32, {"causal": False}),
    "split_group": (40, 40, 20, 1, 32, 32, {}),
    "everything": (
        300, 300, 4, 2, 112, 32,
        {"segment_ids": SEGMENTS, "window": 60, "sink_tokens": 2, "prefix": 9, "softcap": 3.0,
         "sinks": True, "scale": 0.2},
    ),
}  # fmt: skip

# Three spans of keys in small blocks, so that dq is summed in HBM. Returning documents leave blocks
# of queries without visible keys in a span between blocks with some, a window at the end of a span;
# with few queries one block comes again and again.
RETURNING = np.array([[1] * 256 + [2] * 256 + [1] * 188, [3] * 100 + [4] * 400 + [3] * 200])
SPANS = {
    "causal": (700, 700, 2, 1, 32, 32, {}),
    "returning": (700, 700, 2, 1, 32, 32, {"segment_ids": RETURNING}),
    "window": (700, 700, 2, 2, 32, 32, {"window": 200}),
    "few_queries": (5, 700, 2, 1, 32, 32, {"positions": 2 * POSITIONS}),
    "split_group": (130, 700, 16, 1, 32, 32, {"causal": False}),
}

QUICK = ("everything",)


def inputs(t, s, n, k, h, hv, dtype, size=2.0):
    """[q, k, v] in dtype, and sinks."""
    q = normal(0, B, t, n, h, dtype=dtype) * np.asarray(size, dtype)
    return [q, normal(1, B, s, k, h, dtype=dtype), normal(2, B, s, k, hv, dtype=dtype)], normal(
        3, n
    )


def results(implementation, arrays, sinks, options):
    """Output, log-sum-exp and the gradients of a fixed projection of both, as a list."""
    options = dict(options)
    with_sinks = options.pop("sinks", False)

    def projected(arrays, sinks):
        out, lse = flash_attention(
            *arrays,
            sinks=sinks if with_sinks else None,
            return_lse=True,
            implementation=implementation,
            **options,
        )
        toward = normal(9, *out.shape)
        return jnp.sum(out.astype(jnp.float32) * toward) + jnp.sum(lse * toward[..., 0]), (out, lse)

    run = jit(jax.grad(projected, (0, 1), has_aux=True))
    gradients, values = run(arrays, sinks)
    return [np.asarray(x).astype(np.float32) for x in jax.tree.leaves((values, gradients))]


def compare(shape, options, dtype=jnp.float32, size=2.0, **interpret):
    """Compares with attention in blocks in float32."""
    arrays, sinks = inputs(*shape, dtype, size)
    with interpreted(**interpret):
        got = results("tpu", arrays, sinks, options)
    want = results("reference", float32(*arrays), sinks, options)
    t, s, n, k, h, _ = shape
    scores = np.einsum(
        "btkgh,bskh->bkgts",
        np.asarray(arrays[0], np.float32).reshape(B, t, k, n // k, h),
        np.asarray(arrays[1], np.float32),
    )
    score = tolerance.largest(scores) * options.get("scale", h**-0.5)
    # Sums over keys, queries and the head width; a score, whose error the exponential amplifies.
    # Scaled queries, weights, gradients of scores and results are rounded to the dtype.
    roundings = 0 if dtype == jnp.float32 else 4
    for a, b in zip(got, want, strict=True):
        sums = s, t, h, h, h * score**2
        atol = tolerance.of_chain(b, *sums, roundings=roundings, dtype=dtype)
        np.testing.assert_allclose(a, b, rtol=0, atol=max(atol, tolerance.of_chain(1.0, *sums)))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that each case has several of every kind."""
    forward, backward = tpu.forward_sizes, tpu.backward_sizes

    def smaller(of):
        def choose(t, s, *rest):
            chosen = of(t, s, *rest)
            least = min(chosen.rows, 128)
            return chosen._replace(rows=least, block=256, wide=256, narrow=128)

        return choose

    monkeypatch.setattr(tpu, "forward_sizes", smaller(forward))
    monkeypatch.setattr(tpu, "backward_sizes", smaller(backward))


@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in QUICK)],
)
def test_equals_attention_in_blocks(name, small_blocks):
    *shape, options = CASES[name]
    compare(shape, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_in_bfloat16(name, small_blocks):
    *shape, options = CASES[name]
    compare(shape, options, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("size", [20.0, 300.0])
@pytest.mark.parametrize("name", ["causal", "window_and_sinks"])
def test_large_scores(name, size, small_blocks):
    """Scores too large for a softmax without maximum, and for one with the maximum of a single
    chunk: e**(300 * 16 / 8) overflows float32."""
    *shape, options = CASES[name]
    compare(shape, options, size=size)


@pytest.mark.slow
def test_two_cores_do_not_race(small_blocks, capfd):
    *shape, options = CASES["segments"]
    compare(shape, options, detect_races=True, num_cores_or_threads=2)
    assert "race" not in capfd.readouterr().out.lower()


@pytest.mark.slow
@pytest.mark.parametrize(("cores", "copies"), [(1, "eager"), (1, "on_wait"), (2, "on_wait")])
@pytest.mark.parametrize("name", SPANS)
def test_several_spans_without_races(name, cores, copies, small_blocks, capfd):
    """Copies happen when they are started (eager) or when they are waited for."""
    *shape, options = SPANS[name]
    interpret = {"dma_execution_mode": copies, "num_cores_or_threads": cores}
    compare(shape, options, detect_races=True, **interpret)
    assert "race" not in capfd.readouterr().out.lower()


@pytest.mark.slow
@settings(deadline=None, max_examples=5, derandomize=True)
@given(data=st.data())
def test_drawn_options(data):
    """Random lengths, heads, widths and options."""
    t = data.draw(st.integers(1, 400), "T")
    kv_heads, groups = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]), "heads")
    widths = data.draw(st.sampled_from([(32, 32), (80, 80), (96, 64), (112, 128)]), "widths")
    options = {"causal": data.draw(st.booleans(), "causal")}
    s = t
    if data.draw(st.booleans(), "chunk"):
        s = t + data.draw(st.integers(0, 300), "more")
        options["positions"] = np.arange(s - t, s) * np.ones((B, 1), int)
    if options["causal"]:
        window = data.draw(st.none() | st.integers(1, 400), "window")
        if window is not None:
            options |= {"window": window, "sink_tokens": data.draw(st.integers(0, 5), "first")}
        options["prefix"] = data.draw(st.none() | st.integers(1, 300), "prefix")
    options["softcap"] = data.draw(st.none() | st.just(4.0), "softcap")
    options["sinks"] = data.draw(st.booleans(), "sinks")
    if data.draw(st.booleans(), "segments"):
        random = np.random.default_rng(data.draw(st.integers(0, 9), "seed"))
        documents = np.sort(random.integers(0, 4, (B, s)))
        options |= {"segment_ids": documents[:, s - t :], "kv_segment_ids": documents}
    compare((t, s, kv_heads * groups, kv_heads, *widths), options)
