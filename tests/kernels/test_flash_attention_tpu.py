"""The TPU kernel, interpreted on CPU with uninitialised memory as NaN and reads out of bounds
refused, equals the plain-JAX form that test_attention.py holds to the specification.

Tolerances: float32 sums of at most 600 products in another order, relative to the largest element
(eps 6e-8); in bfloat16 the scaled queries, the weights, the scores' gradients and the results are
each rounded to 8 bits (2**-9 relative).
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import flash_attention
from kernels_pallas.attention import tpu

B = 2
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 0.02}
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

# Of three spans of keys in small blocks, so that dq is summed in HBM. Documents that come back
# leave blocks of queries that see nothing of a span between others that do, a window leaves them at
# a span's end; of few queries, one block comes again and again.
RETURNING = np.array([[1] * 256 + [2] * 256 + [1] * 188, [3] * 100 + [4] * 400 + [3] * 200])
SPANS = {
    "causal": (700, 700, 2, 1, 32, 32, {}),
    "returning": (700, 700, 2, 1, 32, 32, {"segment_ids": RETURNING}),
    "window": (700, 700, 2, 2, 32, 32, {"window": 200}),
    "few_queries": (5, 700, 2, 1, 32, 32, {"positions": 2 * POSITIONS}),
    "split_group": (130, 700, 16, 1, 32, 32, {"causal": False}),
}

QUICK = {name: CASES[name] for name in ("causal", "heads_share_lanes", "split_group", "everything")}


@contextlib.contextmanager
def interpreted(**options):
    """On one core, reads of what was never written give NaN and those out of bounds raise."""
    checks = {"uninitialized_memory": "nan", "out_of_bounds_reads": "raise"} | options
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**checks)):
            yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def inputs(t, s, n, k, h, hv, dtype, size=2.0):
    keys = jax.random.split(jax.random.key(0), 4)
    q = size * jax.random.normal(keys[0], (B, t, n, h))
    key, value = (
        jax.random.normal(r, (B, s, k, width)) for r, width in zip(keys[1:3], (h, hv), strict=True)
    )
    return [x.astype(dtype) for x in (q, key, value)], jax.random.normal(keys[3], (n,))


def results(implementation, arrays, sinks, options):
    """Output, log-sum-exp and all gradients of a fixed projection of both."""
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
        toward = jax.random.normal(jax.random.key(9), out.shape)
        return jnp.sum(out.astype(jnp.float32) * toward) + jnp.sum(lse * toward[..., 0]), (out, lse)

    def run(arrays, sinks):
        value, gradients = jax.value_and_grad(projected, (0, 1), has_aux=True)(arrays, sinks)
        return value[1], gradients

    return jax.jit(run)(arrays, sinks)


def compare(shape, options, dtype=jnp.float32, size=2.0, atol=None, **interpret):
    arrays, sinks = inputs(*shape, dtype, size)
    with interpreted(**interpret):
        got = results("tpu", arrays, sinks, options)
        got = jax.tree.map(np.asarray, got)
    exact = [x.astype(jnp.float32) for x in arrays]
    want = results("reference", exact, sinks, options)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.float32(a), np.float32(b)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=(atol or TOLERANCE[dtype]) * max(1.0, np.abs(b).max())
        )


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that each of these cases has several of every kind."""
    forward, backward = tpu.forward_sizes, tpu.backward_sizes

    def smaller(of):
        def choose(t, s, *rest):
            chosen = of(t, s, *rest)
            least = min(chosen.rows, 128)
            return chosen._replace(rows=least, block=256, wide=256, narrow=128)

        return choose

    monkeypatch.setattr(tpu, "forward_sizes", smaller(forward))
    monkeypatch.setattr(tpu, "backward_sizes", smaller(backward))


@pytest.mark.parametrize("name", QUICK)
def test_equals_the_plain_form(name, small_blocks):
    *shape, options = CASES[name]
    compare(shape, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_equals_the_plain_form_too(name, small_blocks):
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
    """Scores beyond what the kernel takes without a maximum, and beyond what it takes with that of
    one chunk: e**(300 * 16 / 8) is no number of float32. The tolerance grows with the scores, of
    which float32 keeps 2**-24."""
    *shape, options = CASES[name]
    compare(shape, options, size=size, atol=1e-5 * size)


@pytest.mark.slow
def test_two_cores_do_not_race(small_blocks, capfd):
    *shape, options = CASES["segments"]
    compare(shape, options, detect_races=True, num_cores_or_threads=2)
    assert "race" not in capfd.readouterr().out.lower()


def test_several_spans(small_blocks, capfd):
    check_spans("returning", capfd)


@pytest.mark.slow
@pytest.mark.parametrize(("cores", "copies"), [(1, "eager"), (1, "on_wait"), (2, "on_wait")])
@pytest.mark.parametrize("name", SPANS)
def test_several_spans_too(name, cores, copies, small_blocks, capfd):
    """Copies are done as soon as they are started, or only when they are waited for."""
    check_spans(name, capfd, dma_execution_mode=copies, num_cores_or_threads=cores)


def check_spans(name, capfd, **interpret):
    *shape, options = SPANS[name]
    compare(shape, options, detect_races=True, **interpret)
    assert "race" not in capfd.readouterr().out.lower()


@pytest.mark.slow
@settings(deadline=None, max_examples=5, derandomize=True)
@given(data=st.data())
def test_drawn_options(data):
    """Lengths, heads, widths and options that nobody chose."""
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
