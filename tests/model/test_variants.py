"""Properties of every kind of layer: it is causal, keeps packed documents separate, can be cached,
and differs from the base config, which catches options without effect."""

import dataclasses

import jax
import numpy as np
import pytest

from lm import model

NORM, OFFSET = model.RMSNormConfig(), model.RMSNormConfig(offset=1.0)
LOCAL = model.GQA(heads=4, kv_heads=2, head_dim=8, window=3)

ATTENTION = {
    "theta": {"position": model.RoPE(theta=100.0)},
    "linear": {"position": model.RoPE(scaling=model.LinearScaling(factor=4))},
    "ntk": {"position": model.RoPE(scaling=model.NTK(factor=4))},
    "yarn": {"position": model.RoPE(scaling=model.YaRN(factor=4, original=16))},
    "llama3": {"position": model.RoPE(scaling=model.Llama3Scaling(factor=4, original=32))},
    "partial": {"position": model.RoPE(fraction=0.5)},
    "alibi": {"position": model.ALiBi()},
    "no_position": {"position": model.NoPosition()},
    "qk_norm": {"qk_norm": model.QKNorm(norm=NORM)},
    "qk_norm_whole": {"qk_norm": model.QKNorm(norm=model.LayerNormConfig(), over="projection")},
    "bias": {"bias": True},
    "out_bias": {"out_bias": True},
    "softcap": {"softcap": 1.0},
    "window": {"window": 3},
    "learned_sinks": {"sinks": model.LearnedSinks()},
    "first_tokens": {"window": 3, "sinks": model.FirstTokens(count=2)},
    "scale": {"scale": 1.0},
    "mha": {"kv_heads": 4},
    "mqa": {"kv_heads": 1},
}
WHOLE = {
    "layer_norm": {"norm": model.LayerNormConfig()},
    "layer_norm_no_bias": {"norm": model.LayerNormConfig(bias=False)},
    "one_plus_norm": {"norm": OFFSET},
    "post": {"placement": "post"},
    "output": {"placement": "output"},
    "sandwich": {"placement": "sandwich"},
    "geglu": {"ffn": model.GeGLU(hidden=24)},
    "ffn_bias": {"ffn": model.SwiGLU(hidden=24, bias=True)},
    "relu2": {"ffn": model.ReLU2(hidden=24)},
    "mlp": {"ffn": model.MLP(hidden=24, bias=True)},
    "mlp_tanh": {"ffn": model.MLP(hidden=24, activation="gelu_tanh")},
    "mlp_relu": {"ffn": model.MLP(hidden=24, activation="relu")},
    "mlp_silu": {"ffn": model.MLP(hidden=24, activation="silu")},
    "moe": {"ffn": model.MoE(experts=4, experts_per_token=2, hidden=8)},
    "embed_scale": {"embed_scale": 4.0},
    "logit_softcap": {"logit_softcap": 2.0},
    "tied": {"tied": True},
    "alternating": {"pattern": (model.Block(attention=LOCAL), model.Block())},
    "prefix": {"prefix": (model.Block(ffn=model.ReLU2(hidden=24)),)},
    # Six layers: one prefix layer, the pattern twice, and its first block once more.
    "all_parts": {
        "layers": 6,
        "prefix": (model.Block(ffn=model.ReLU2(hidden=24)),),
        "pattern": (model.Block(attention=LOCAL), model.Block()),
    },
}
VARIANTS = ["base", *ATTENTION, *WHOLE]
# Marked slow in the packing and caching tests: variants that differ from one of the others only in
# numbers that neither packing nor caching depends on.
SLOW = {"theta", "linear", "ntk", "llama3", "bias", "out_bias", "softcap", "scale", "mqa", "geglu"}
SLOW |= {"layer_norm", "layer_norm_no_bias", "one_plus_norm", "output", "sandwich", "ffn_bias"}
SLOW |= {"relu2", "mlp", "mlp_tanh", "mlp_relu", "mlp_silu", "embed_scale", "logit_softcap"}


@pytest.fixture(scope="session")
def configs(base, attend):
    """Returns a function: name of a variant -> its config."""
    return lambda name: (
        attend(**ATTENTION[name])
        if name in ATTENTION
        else dataclasses.replace(base, **WHOLE.get(name, {}))
    )


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in VARIANTS])
def variant(request, configs):
    """(name, config)"""
    return request.param, configs(request.param)


@pytest.mark.parametrize("variant", VARIANTS[1:], indirect=True)
def test_variant_differs_from_the_base_config(variant, base, run, tokens):
    _, config = variant
    difference = np.abs(run(config, tokens) - run(base, tokens)).max()
    assert difference > 1e-2, "the option has no effect"


@pytest.mark.parametrize(
    "name", ["base", "alibi", "window", "first_tokens", "learned_sinks", "post", "moe", "all_parts"]
)
def test_attention_is_causal(name, configs, draw, tokens):
    """The gradient of the hidden state at position 5 is exactly zero at later tokens and nonzero at
    all earlier ones, except that two layers with windows of 3 reach only the last five tokens."""
    config = dataclasses.replace(configs(name), tied=False)

    def hidden(table, params):
        params = params | {"embed": {"table": table}}
        return model.Model(config, params)(tokens).hidden_btd[:, 5, 0].sum()

    params = draw(config)
    gradient = np.asarray(jax.jit(jax.grad(hidden))(params["embed"]["table"], params))
    assert not gradient[tokens[:, 6:]].any()
    seen = np.abs(gradient[tokens[:, :6]]).max(-1) > 0
    assert seen[:, 1:].all() and seen[:, 0].all() == (name != "window")


def test_packed_documents_match_separate_runs(variant, run, tokens):
    """Two documents of 6 tokens each match runs in which the document starts a row. Within 1e-5:
    the softmax sums the same terms and additional zeros in a different order."""
    _, config = variant
    ones, places = np.ones((2, 1), np.int32), np.arange(12, dtype=np.int32)
    packed = run(
        config, tokens, segments_bt=ones * (1 + places // 6), positions_bt=ones * (places % 6)
    )
    alone = [run(config, np.roll(tokens, -start, axis=1))[:, :6] for start in (0, 6)]
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), atol=1e-5, rtol=1e-5)


def test_cached_decoding_matches_the_uncached_forward_pass(variant, run, draw, tokens):
    """A prompt of 5 tokens in the first row and of 3 in the second, then one token at a time, in a
    cache longer than the sequence. At every position the logits match those of a pass over the
    whole sequence, within 1e-4."""
    _, config = variant
    params, length = draw(config), tokens.shape[1]

    @jax.jit
    def step(params, tokens, positions, cache, mask=None):
        out = model.Model(config, params)(tokens, positions_bt=positions, mask_bt=mask, cache=cache)
        return model.Model(config, params).logits(out.hidden_btd), out.cache

    lengths, slots = np.array([5, 3]), 16
    positions = np.arange(5) * np.ones((2, 1), np.int32)
    mask = positions < lengths[:, None]  # padding writes nothing
    cache = model.init_cache(config, 2, slots)
    expected = run(config, tokens)
    logits, cache = step(params, tokens[:, :5], positions, cache, mask)
    for row in range(2):
        np.testing.assert_allclose(
            logits[row, : lengths[row]], expected[row, : lengths[row]], atol=1e-4
        )
    for i in range(length - 5):
        place = lengths + i
        logits, cache = step(params, tokens[np.arange(2), place][:, None], place[:, None], cache)
        np.testing.assert_allclose(logits[:, 0], expected[np.arange(2), place], atol=1e-4)
