"""Parameter and FLOP counts computed from the config match the arrays and XLA's cost analysis."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lm import model, trees

WIDE = model.Config(
    vocab=512,
    dim=128,
    layers=2,
    attention=model.GQA(heads=4, kv_heads=2, head_dim=32),
    ffn=model.SwiGLU(hidden=384),
)


def test_parameter_count_matches_the_initialized_arrays(base):
    config = dataclasses.replace(
        base,
        layers=5,
        prefix=(model.Block(ffn=model.MLP(hidden=24, bias=True)),),
        pattern=(
            model.Block(ffn=model.MoE(experts=8, experts_per_token=2, hidden=8)),
            model.Block(),
        ),
    )
    counts = model.parameter_count(config)
    assert counts.total == trees.count(model.init(config, jax.random.key(0)))
    assert counts.embedding == 40 * 16
    # Two MoE layers, each with 6 of 8 experts inactive per token; an expert has three matrices.
    assert counts.total - counts.active == 2 * 6 * 3 * 16 * 8
    assert model.parameter_count(base).active == model.parameter_count(base).total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_forward_flops_match_xla(tied, layers):
    """Within 2 %: softmax, norms and activations account for the difference. The layers are not
    scanned, because XLA counts the body of a scan once."""
    blocks = (model.Block(),) * layers
    config = dataclasses.replace(WIDE, layers=layers, prefix=blocks, tied=tied)
    length = 64

    def forward(params, tokens):
        return model.Model(config, params).logits(model.Model(config, params)(tokens).hidden_btd)

    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(forward).lower(model.shapes(config), tokens).compile()
    counted = compiled.cost_analysis()["flops"]
    assert model.flops(config, length) * length == pytest.approx(counted, rel=0.02)


def test_training_flops_match_the_formula():
    """6 N + 12 L D T / 2 per token, where D is the width of all heads and N excludes the norms and
    the embedding table, which is only looked up."""
    length = 256
    counts = model.parameter_count(WIDE)
    norms = 128 * (2 * 2 + 1)
    weights = counts.total - counts.embedding - norms
    expected = 6 * weights + 12 * 2 * 128 * length / 2
    assert model.train_flops(WIDE, length) == pytest.approx(expected)
    forward = 2 * weights + 4 * 2 * 128 * length
    assert model.flops(WIDE, length) == pytest.approx(forward)


def test_training_flops_account_for_the_attention_window():
    """Counts the query-key pairs of a causal window one by one. The tolerance is half a key per
    query, since the formula counts the diagonal as half."""

    def attention(window: int | None, length: int) -> float:
        config = dataclasses.replace(
            WIDE, attention=dataclasses.replace(WIDE.attention, window=window)
        )
        return model.train_flops(config, length) - 3 * model.flops(config, 0)

    length, window = 64, 16
    pairs = sum(min(i + 1, window) for i in range(length)) / length
    expected = 12 * 2 * 128 * pairs
    assert attention(window, length) == pytest.approx(expected, rel=0.5 / pairs)
    assert attention(length, length) == attention(None, length) == attention(length + 1, length)
