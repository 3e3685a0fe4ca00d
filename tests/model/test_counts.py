"""Counts from the declaration against the arrays and against XLA."""

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


def test_parameters_are_those_of_the_arrays(base):
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
    # Two MoE layers, of whose 8 experts 6 rest; each has three matrices.
    assert counts.total - counts.active == 2 * 6 * 3 * 16 * 8
    assert model.parameter_count(base).active == model.parameter_count(base).total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_forward_flops_are_those_of_xla(tied, layers):
    """Within 2 %, which softmax, norms and activations fill. Single layers, for XLA counts a scan's
    body once."""
    blocks = (model.Block(),) * layers
    config = dataclasses.replace(WIDE, layers=layers, prefix=blocks, tied=tied)
    length = 64

    def forward(params, tokens):
        return model.Model(config, params).logits(model.Model(config, params)(tokens).hidden_btd)

    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(forward).lower(model.shapes(config), tokens).compile()
    counted = compiled.cost_analysis()["flops"]
    assert model.flops(config, length) * length == pytest.approx(counted, rel=0.02)


def test_training_flops_follow_their_formula():
    """6 N + 12 L D T halved, where D is the width of all heads and N leaves out the table that is
    only looked up."""
    length = 256
    counts = model.parameter_count(WIDE)
    norms = 128 * (2 * 2 + 1)
    weights = counts.total - counts.embedding - norms
    expected = 6 * weights + 12 * 2 * 128 * length / 2
    assert model.train_flops(WIDE, length) == pytest.approx(expected)
    forward = 2 * weights + 4 * 2 * 128 * length
    assert model.flops(WIDE, length) == pytest.approx(forward)


def test_training_flops_see_the_window():
    """The pairs of a causal window, counted one by one: half a key apart per query, since the
    formula takes the diagonal as half."""

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
