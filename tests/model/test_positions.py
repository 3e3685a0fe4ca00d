"""Rotary embeddings and their scaling methods, ALiBi, windows, sinks, grouped heads and norms match
the formulas of their papers."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import model
from lm.model.attention import Positions
from lm.model.rope import rotate

WIDTH = 64


def frequencies(position: model.RoPE, head_dim: int = WIDTH) -> np.ndarray:
    """Rotation of each pair per position in radians, from the table. Also checks the angles at
    position 3."""
    cos, sin = (np.asarray(t)[0, :, 0] for t in position.table(jnp.arange(4)[None], head_dim))
    amplitude = np.hypot(cos, sin)
    angles = np.arctan2(sin, cos)
    np.testing.assert_allclose(np.cos(3 * angles[1]), (cos / amplitude)[3], atol=1e-4)
    return angles[1]


def plain(theta: float = 10_000.0, width: int = WIDTH) -> np.ndarray:
    return np.array([1 / theta ** (2 * i / width) for i in range(width // 2)])


def test_each_pair_rotates_by_its_frequency():
    """Entries i and i + H/2 are the two coordinates of pair i."""
    x = np.random.default_rng(0).standard_normal((1, 5, 2, 8)).astype(np.float32)
    turned = np.asarray(rotate(jnp.asarray(x), model.RoPE().table(jnp.arange(5)[None], 8)))
    angle = np.arange(5)[:, None] * plain(width=8)
    expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[None, :, None]
    np.testing.assert_allclose(turned[..., :4], expected.real, atol=1e-5)
    np.testing.assert_allclose(turned[..., 4:], expected.imag, atol=1e-5)


def test_scores_depend_only_on_distance():
    random = np.random.default_rng(1)
    q, k = (jnp.asarray(random.standard_normal((1, 1, 1, WIDTH)), jnp.float32) for _ in range(2))

    def score(m: int, n: int) -> float:
        at = [model.RoPE().table(jnp.array([[place]]), WIDTH) for place in (m, n)]
        return float(jnp.sum(rotate(q, at[0]) * rotate(k, at[1])))

    assert score(17, 5) == pytest.approx(score(112, 100), rel=1e-4)
    assert abs(score(17, 5) - score(17, 6)) > 1e-3


def test_linear_scaling_divides_positions():
    np.testing.assert_allclose(
        frequencies(model.RoPE(scaling=model.LinearScaling(factor=4))), plain() / 4, rtol=1e-4
    )


def test_ntk_scaling_changes_the_base():
    """theta * s^(d / (d - 2)): the fastest pair is unchanged and the slowest is slowed by exactly
    s."""
    scaled = frequencies(model.RoPE(scaling=model.NTK(factor=4)))
    np.testing.assert_allclose(scaled, plain(10_000 * 4 ** (WIDTH / (WIDTH - 2))), rtol=1e-4)
    np.testing.assert_allclose([scaled[0], scaled[-1] * 4], plain()[[0, -1]], rtol=1e-4)


def test_yarn_interpolates_only_slow_pairs():
    """The interpolation ramp lies between the pairs that make 32 turns and 1 turn within the
    original length, rounded outwards."""
    original, factor = 2048, 8
    position = model.RoPE(scaling=model.YaRN(factor=factor, original=original))

    def pair(turns: float) -> float:
        return WIDTH * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(10_000))

    low, high = math.floor(pair(32)), math.ceil(pair(1))
    expected = []
    for i, frequency in enumerate(plain()):
        interpolated = min(max((i - low) / (high - low), 0), 1)
        expected.append(frequency * (1 - interpolated) + frequency / factor * interpolated)
    scaled = frequencies(position)
    np.testing.assert_allclose(scaled, expected, rtol=1e-4)
    turns = original * plain() / (2 * math.pi)
    np.testing.assert_allclose(scaled[turns > 40], plain()[turns > 40], rtol=1e-4)
    np.testing.assert_allclose(scaled[turns < 0.7], plain()[turns < 0.7] / factor, rtol=1e-4)


def test_yarn_sharpens_the_softmax():
    """Queries and keys are each scaled by 0.1 ln(s) + 1, so that the scores have the paper's
    temperature 1/t."""
    scaling = model.YaRN(factor=8, original=2048)
    cos, sin = model.RoPE(scaling=scaling).table(jnp.arange(3)[None], WIDTH)
    np.testing.assert_allclose(np.hypot(cos, sin), 0.1 * math.log(8) + 1, rtol=1e-5)
    other = dataclasses.replace(scaling, attention_factor=1.5)
    cos, sin = model.RoPE(scaling=other).table(jnp.arange(3)[None], WIDTH)
    np.testing.assert_allclose(np.hypot(cos, sin), 1.5, rtol=1e-5)


def test_llama3_scaling_depends_on_the_wavelength():
    """Wavelengths below original / high are unchanged, those above original / low are multiplied by
    the factor, and those in between are blended."""
    original, factor, low, high = 8192, 8, 1.0, 4.0
    scaling = model.Llama3Scaling(factor=factor, original=original, low=low, high=high)
    expected = []
    for frequency in plain(500_000.0):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            expected.append(frequency)
        elif wavelength > original / low:
            expected.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    scaled = frequencies(model.RoPE(theta=500_000.0, scaling=scaling))
    np.testing.assert_allclose(scaled, expected, rtol=1e-4)


def test_partial_rotation_leaves_the_other_entries_unchanged():
    x = np.random.default_rng(2).standard_normal((1, 6, 1, 16)).astype(np.float32)
    table = model.RoPE(fraction=0.5).table(jnp.arange(6)[None], 16)
    turned = np.asarray(rotate(jnp.asarray(x), table))
    np.testing.assert_array_equal(turned[..., 8:], x[..., 8:])
    whole = rotate(jnp.asarray(x[..., :8]), model.RoPE().table(jnp.arange(6)[None], 8))
    np.testing.assert_allclose(turned[..., :8], whole, atol=1e-6)


def test_alibi_slopes_match_the_paper():
    """For 8 heads, the slopes of the paper; for 6 heads, those of 4 heads followed by every other
    slope of 8 heads."""
    np.testing.assert_allclose(model.ALiBi().slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(model.ALiBi().slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


def test_alibi_weights_decay_with_distance():
    """With all-zero keys, head n averages the values with weights exp(-slope_n * distance)."""
    dim, n, h, t = 16, 4, 8, 12
    config = model.MHA(heads=n, head_dim=h, position=model.ALiBi())
    layer = config.build(dim, nnx.Rngs(params=0), model.Normal(std=1.0).build(1))
    layer.k[...] = jnp.zeros_like(layer.k[...])
    x = np.random.default_rng(4).standard_normal((1, t, dim)).astype(np.float32)
    out, _ = layer(jnp.asarray(x), Positions(None, None, None, {}), None)

    distance = np.arange(t)[:, None] - np.arange(t)
    weights = np.exp(-np.array([2.0**-2, 2**-4, 2**-6, 2**-8])[:, None, None] * distance)
    weights = np.where(distance >= 0, weights, 0)
    weights /= weights.sum(-1, keepdims=True)
    v = np.einsum("btd,dnh->btnh", x, np.asarray(layer.v[...]))
    expected = np.einsum("nts,bsnh,nhd->btd", weights, v, np.asarray(layer.o[...]))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_window_attends_only_to_the_last_tokens(attend, run, tokens):
    """One layer attends only to the window, and RoPE depends only on distances, so the last logits
    equal those of the last 5 tokens alone."""
    config = dataclasses.replace(attend(window=5), layers=1)
    whole = run(config, tokens)[:, -1]
    np.testing.assert_allclose(whole, run(config, tokens[:, -5:])[:, -1], atol=1e-5)
    assert np.abs(whole - run(config, tokens[:, -4:])[:, -1]).max() > 1e-2


def test_window_as_long_as_the_sequence_equals_full_attention(base, attend, run, tokens):
    np.testing.assert_allclose(run(attend(window=12), tokens), run(base, tokens), atol=1e-5)


def test_first_tokens_stay_visible(attend, run, tokens):
    """Without position encoding, the last logits of one layer with a window of 4 and 2 first tokens
    equal those of these 6 tokens alone."""
    options = {"position": model.NoPosition(), "window": 4, "sinks": model.FirstTokens(count=2)}
    config = dataclasses.replace(attend(**options), layers=1)
    alone = dataclasses.replace(attend(position=model.NoPosition()), layers=1)
    picked = np.concatenate([tokens[:, :2], tokens[:, -4:]], axis=1)
    np.testing.assert_allclose(run(config, tokens)[:, -1], run(alone, picked)[:, -1], atol=1e-5)


@pytest.mark.parametrize(("logit", "same_as"), [(-50.0, "no sinks"), (50.0, "no attention")])
def test_learned_sinks_absorb_none_or_all_of_the_attention(
    base, attend, draw, run, tokens, logit, same_as
):
    config = attend(sinks=model.LearnedSinks())
    params, plain = draw(config), draw(base)
    params["blocks"]["0"]["attention"]["sinks"][:] = logit
    if same_as == "no attention":
        plain["blocks"]["0"]["attention"]["o"][:] = 0
    np.testing.assert_allclose(
        run(config, tokens, params), run(base, tokens, plain), rtol=1e-5, atol=1e-5
    )


def test_grouped_query_attention_matches_repeated_key_value_heads(base, attend, draw, run, tokens):
    """Two key/value heads for four query heads match multi-head attention with each key/value head
    repeated twice."""
    params, repeated = draw(base), draw(base)
    for name in ("k", "v"):
        w = params["blocks"]["0"]["attention"][name]
        repeated["blocks"]["0"]["attention"][name] = np.repeat(w, 2, axis=2)
    np.testing.assert_allclose(
        run(attend(kv_heads=4), tokens, repeated), run(base, tokens, params), atol=1e-5
    )


def test_mha_and_mqa_are_special_cases_of_gqa():
    assert model.MHA(heads=4, head_dim=8).kv_heads == 4
    assert model.MQA(heads=4, head_dim=8, window=3) == model.GQA(
        heads=4, kv_heads=1, head_dim=8, window=3
    )


def test_non_causal_attention_depends_on_later_tokens(attend, run, tokens):
    config = attend(causal=False)
    other = tokens.copy()
    other[:, -1] = 39
    assert np.abs(run(config, other) - run(config, tokens))[:, 0].max() > 1e-3


@pytest.mark.parametrize("norm", [model.RMSNormConfig(offset=1.0), model.LayerNormConfig()])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norms_reduce_in_float32(norm, dtype):
    """In bfloat16 the result is the float64 result rounded once: relative error 2^-8."""
    x = 100 + np.random.default_rng(3).standard_normal((4, 256))
    x = np.asarray(jnp.asarray(x, dtype), np.float64)
    if isinstance(norm, model.LayerNormConfig):
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    else:
        expected = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + norm.eps)
    got = norm.build(256, nnx.Rngs(params=0))(jnp.asarray(x, dtype))
    assert got.dtype == dtype
    tolerance = 2**-8 if dtype == jnp.bfloat16 else 1e-4
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=tolerance, atol=1e-4)


def test_dynamic_ntk_changes_only_positions_beyond_the_original_length():
    """Beyond the original length, each position uses the base for its own length, so that decoding
    with cached keys matches a single pass."""
    scaled = model.RoPE(scaling=model.DynamicNTK(factor=4.0, original=32))
    cos, _ = scaled.table(jnp.arange(64)[None], WIDTH)
    same, _ = model.RoPE().table(jnp.arange(32)[None], WIDTH)
    np.testing.assert_array_equal(cos[:, :32], same)
    last = 63
    base = 10_000.0 * (4.0 * (last + 1) / 32 - 3.0) ** (WIDTH / (WIDTH - 2))
    np.testing.assert_allclose(cos[0, last, 0], np.cos(last * plain(base)), atol=1e-4)
    alone, _ = scaled.table(jnp.array([[last]]), WIDTH)
    np.testing.assert_array_equal(alone[0, 0], cos[0, last])
