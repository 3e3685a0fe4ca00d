"""KV caches: memory of a sliding window, and the same numbers as the forward pass without a
cache."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import model
from lm.generate import Sampling, generate

WINDOW, SINKS, TEXT, CONTEXT = 64, 4, 2_000, 2_048
VOCAB, DIM, LAYERS, KV_HEADS, HEAD = 64, 32, 2, 1, 8
GLOBAL = model.GQA(heads=2, kv_heads=KV_HEADS, head_dim=HEAD)
LOCAL = dataclasses.replace(GLOBAL, window=WINDOW)
LOCAL_WITH_SINKS = dataclasses.replace(LOCAL, sinks=model.FirstTokens(count=SINKS))
PLAIN = model.Config(
    vocab=VOCAB,
    dim=DIM,
    layers=LAYERS,
    attention=GLOBAL,
    ffn=model.SwiGLU(hidden=48),
    embed_std=1.0,
)
WINDOWED = dataclasses.replace(PLAIN, attention=LOCAL)
ALTERNATING = dataclasses.replace(
    PLAIN, pattern=(model.Block(attention=LOCAL_WITH_SINKS), model.Block())
)


def parameters(config: model.Config):
    return jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))


def rounding(largest: float) -> float:
    """Bound on the difference of two float32 logits whose sums are computed in different orders.

    Each logit is the end of a chain of sums: per layer over D for the projections, over the keys
    for attention and over F for the feed-forward, then over D for the logits. A sum of n terms has
    a relative rounding error of about sqrt(n) eps (Higham, Accuracy and Stability, 2002, section
    2.8: rounding errors add up as a random walk). The factor 4 covers the largest error of all
    logits, not the typical one.
    """
    terms = LAYERS * (2 * DIM + CONTEXT + 48) + DIM
    return 4 * math.sqrt(terms) * np.finfo(np.float32).eps * largest


def cache_bytes(config: model.Config, rows: int, length: int) -> dict[str, int]:
    """Bytes of the cache for each block of the pattern."""
    cache = model.init_cache(config, rows, length)
    return {i: sum(x.nbytes for x in jax.tree.leaves(part)) for i, part in cache["blocks"].items()}


def test_sliding_window_cache_allocates_only_the_window():
    rows = 3
    a_slot = 2 * rows * KV_HEADS * HEAD * 4  # keys and values in float32
    assert cache_bytes(WINDOWED, rows, CONTEXT) == {"0": LAYERS * WINDOW * a_slot}
    assert cache_bytes(WINDOWED, rows, 8 * CONTEXT) == {"0": LAYERS * WINDOW * a_slot}
    assert cache_bytes(PLAIN, rows, CONTEXT) == {"0": LAYERS * CONTEXT * a_slot}
    both = {"0": (SINKS + WINDOW) * a_slot, "1": CONTEXT * a_slot}
    assert cache_bytes(ALTERNATING, rows, CONTEXT) == both
    # A sequence shorter than the window needs no ring buffer.
    assert cache_bytes(WINDOWED, rows, WINDOW // 2) == {"0": LAYERS * WINDOW // 2 * a_slot}


def test_each_attention_config_gets_the_expected_cache_type():
    kinds = {
        model.Window: (LOCAL, LOCAL_WITH_SINKS, dataclasses.replace(LOCAL, position=model.ALiBi())),
        # ALiBi needs the distance to the first tokens, which a ring buffer does not keep.
        model.Contiguous: (
            GLOBAL,
            dataclasses.replace(LOCAL_WITH_SINKS, position=model.ALiBi()),
        ),
    }
    for kind, attentions in kinds.items():
        for attention in attentions:
            assert type(attention.init_cache(1, CONTEXT, jnp.float32)) is kind


@partial(jax.jit, static_argnums=0)
def forward_logits(config, params, tokens_bt):
    apply = model.Model(config, params)
    return apply.logits(apply(tokens_bt).hidden_btd)


@pytest.mark.parametrize("config", [WINDOWED, ALTERNATING], ids=["window", "alternating"])
def test_decoding_2_000_tokens_matches_the_uncached_forward_pass(config):
    """Greedy decoding of three prompts of different lengths. The model without a cache, given the
    same tokens, has the same most likely token at every position, except for ties within
    rounding."""
    random, params = np.random.default_rng(1), parameters(config)
    prompts = [random.integers(0, VOCAB, n).tolist() for n in (1, 70, 13)]
    results = generate(
        model.Model(config, params),
        prompts,
        context=CONTEXT,
        max_tokens=TEXT - 70,
        sampling=Sampling(temperature=0),
    )
    texts = [prompt + result.tokens for prompt, result in zip(prompts, results, strict=True)]
    assert [len(result.tokens) for result in results] == [TEXT - 70] * 3
    padded = [text + [0] * (CONTEXT - len(text)) for text in texts]
    logits_btv = forward_logits(config, params, jnp.array(padded))
    logprobs_btv = np.asarray(jax.nn.log_softmax(logits_btv))
    tolerance = rounding(np.abs(logits_btv).max())
    assert tolerance < 1e-3
    for prompt, result, logprobs_tv in zip(prompts, results, logprobs_btv, strict=True):
        logprobs_tv = logprobs_tv[len(prompt) - 1 :][: len(result.tokens)]
        second_t, best_t = np.sort(logprobs_tv, axis=-1)[:, -2:].T
        tie_t = best_t - second_t < 2 * tolerance
        same_t = logprobs_tv.argmax(-1) == np.array(result.tokens)
        assert (same_t | tie_t).all() and tie_t.mean() < 0.01
        chosen_t = np.take_along_axis(logprobs_tv, np.array(result.tokens)[:, None], -1)[:, 0]
        np.testing.assert_allclose(result.logprobs, chosen_t, rtol=0, atol=tolerance)
    assert len({tuple(result.tokens[-100:]) for result in results}) > 1


# Every cache type, as a single layer and in a scan.
SMALL = {"heads": 2, "kv_heads": 1, "head_dim": 8}
FORMS = model.Config(
    vocab=VOCAB,
    dim=DIM,
    layers=3,
    prefix=(model.Block(attention=model.GQA(**SMALL, window=6, position=model.ALiBi())),),
    pattern=(
        model.Block(attention=model.GQA(**SMALL, window=6, sinks=model.FirstTokens(count=2))),
        model.Block(attention=model.GQA(**SMALL)),
    ),
    ffn=model.SwiGLU(hidden=48),
    embed_std=1.0,
)
LENGTH = 20
LENGTHS = np.array([20, 13, 5, 1])  # of the rows; the remainder of each row is padding


@jax.jit
def extend(params, cache, tokens_bt, positions_bt, mask_bt):
    apply = model.Model(FORMS, params)
    out = apply(tokens_bt, positions_bt=positions_bt, mask_bt=mask_bt, cache=cache)
    return apply.logits(out.hidden_btd), out.cache


@pytest.fixture(scope="module")
def filled():
    """Returns a function: chunk sizes -> (params, tokens, logits, the cache after this prefill)."""
    params = parameters(FORMS)
    tokens = np.random.default_rng(2).integers(0, VOCAB, (len(LENGTHS), LENGTH + 4))

    def prefill(*chunks: int):
        cache, logits, start = model.Model(FORMS, params).init_cache(len(LENGTHS), 32), [], 0
        for size in chunks:
            places = np.tile(np.arange(start, start + size), (len(LENGTHS), 1))
            part, mask = tokens[:, start : start + size], places < LENGTHS[:, None]
            part = np.where(mask, part, VOCAB - 1)
            z_btv, cache = extend(params, cache, part, places, mask)
            logits.append(z_btv)
            start += size
        assert start == LENGTH
        return params, tokens, np.concatenate(logits, axis=1), cache

    return prefill


@pytest.mark.parametrize("chunks", [(LENGTH,), (4, 16), (16, 4)], ids=str)
def test_chunked_prefill_matches_the_uncached_forward_pass(filled, chunks):
    """Chunks are shorter and longer than the windows; some consist partly or entirely of
    padding."""
    params, tokens, logits, cache = filled(*chunks)
    expected = np.asarray(forward_logits(FORMS, params, tokens))
    tolerance = rounding(np.abs(expected).max())
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            logits[row, :length], expected[row, :length], rtol=0, atol=tolerance
        )
    # Each row continues after its own last token.
    for step in range(4):
        places = (LENGTHS + step)[:, None]
        z_btv, cache = extend(
            params, cache, np.take_along_axis(tokens, places, 1), places, np.ones_like(places, bool)
        )
        wanted = np.take_along_axis(expected, places[..., None], 1)
        np.testing.assert_allclose(z_btv, wanted, rtol=0, atol=tolerance)


def test_window_cache_contents_do_not_depend_on_prefill_chunks(filled):
    whole, parts = (filled(*chunks)[-1] for chunks in ((LENGTH,), (4, 16)))
    for part in ("prefix", "blocks"):
        for i, cache in whole[part].items():
            if isinstance(cache, model.Window):
                assert cache.k.shape[-3] == cache.window + cache.sinks
                for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(parts[part][i])):
                    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
