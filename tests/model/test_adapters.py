"""Adapters: what each computes, which weights they add, and what stays as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import model, quant, trees
from lm.errors import UserError
from lm.generate import Sampling, generate
from lm.model import Model

ADAPTERS = {
    "lora": model.LoRA(rank=4, alpha=8.0),
    "rslora": model.LoRA(rank=4, rslora=True, targets=("**/attention/q", "embed/table")),
    "prefix": model.Prefix(tokens=3, std=0.5),
    "encoder": model.Prefix(tokens=3, hidden=8, std=0.5),
    "bottleneck": model.Bottleneck(hidden=8),
}
FROM_THE_MODEL = ("lora", "rslora", "bottleneck")  # these start from what the model computes
EXPERTS = {"ffn": model.MoE(experts=4, experts_per_token=2, hidden=8)}


SLOW = ("rslora", "encoder")


@pytest.fixture(
    params=[pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in ADAPTERS]
)
def adapted(request, base):
    return dataclasses.replace(base, adapter=ADAPTERS[request.param])


def first(config):
    """The weights before training."""
    return jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))


def test_the_model_itself_is_drawn_as_without_an_adapter(adapted, base):
    ours, rest = trees.partition(first(adapted), ("adapter/**",))
    assert ours
    for path, x in trees.flatten(first(base)).items():
        np.testing.assert_array_equal(trees.flatten(rest)[path], x)
    assert trees.flatten(rest).keys() == trees.flatten(model.shapes(base)).keys()


@pytest.mark.parametrize("name", FROM_THE_MODEL)
def test_training_starts_from_the_model(name, base, run, tokens):
    config = dataclasses.replace(base, adapter=ADAPTERS[name])
    logits = run(base, tokens, first(base))
    np.testing.assert_allclose(run(config, tokens, first(config)), logits, rtol=0, atol=1e-6)


def test_every_weight_of_an_adapter_has_a_gradient(adapted, draw, tokens):
    ours, rest = trees.partition(draw(adapted), ("adapter/**",))

    def loss(ours):
        apply = Model(adapted, trees.merge(ours, rest))
        return jnp.sum(apply.logits(apply(tokens).hidden_btd) ** 2)

    for path, x in trees.flatten(jax.jit(jax.grad(loss))(ours)).items():
        assert np.all(np.isfinite(x)), path
        assert np.any(x), path


def test_adapters_are_declared_for_sharding(adapted):
    shapes, axes = model.shapes(adapted), model.axes(adapted)
    for path, shape in trees.flatten(shapes).items():
        assert len(trees.flatten(axes)[path]) == len(shape.shape), path


def test_generation_equals_the_forward_pass(adapted, draw, run):
    params = draw(adapted)
    apply = Model(adapted, params)
    (result,) = generate(
        apply, [[1, 2, 3]], context=12, max_tokens=6, sampling=Sampling(temperature=0)
    )
    ids = np.array([[1, 2, 3, *result.tokens]])
    logits = run(adapted, ids, params)[0, 2:-1]
    assert result.tokens == np.argmax(logits, axis=-1).tolist()


def test_packed_documents_match_separate_runs(adapted, draw, run, tokens):
    """A document's logits do not depend on its neighbours in the row."""
    params = draw(adapted)
    a, b = tokens[:1, :5], tokens[:1, 5:8]
    packed = np.concatenate([a, b], axis=1)
    together = Model(adapted, params)(
        packed,
        segments_bt=np.array([[1] * 5 + [2] * 3]),
        positions_bt=np.array([[*range(5), *range(3)]]),
    ).hidden_btd
    for part, rows in ((a, slice(0, 5)), (b, slice(5, 8))):
        alone = Model(adapted, params)(part).hidden_btd
        # One softmax over other blocks of keys.
        np.testing.assert_allclose(together[:, rows], alone, rtol=1e-4, atol=1e-5)


# ---- LoRA


@pytest.mark.parametrize("fields", [{}, EXPERTS, {"tied": True}], ids=["dense", "experts", "tied"])
def test_merged_weights_compute_the_same(fields, base, draw, run, tokens):
    targets = ("**/attention/*", "**/ffn/**", "embed/table")
    adapter = model.LoRA(rank=4, alpha=8.0, targets=targets)
    config = dataclasses.replace(base, adapter=adapter, **fields)
    params = draw(config)
    merged = model.merge(config, params)
    plain = dataclasses.replace(config, adapter=None)
    assert trees.flatten(merged).keys() == trees.flatten(model.shapes(plain)).keys()
    logits = run(config, tokens, params)
    assert np.abs(logits - run(plain, tokens, draw(plain))).max() > 1e-2
    np.testing.assert_allclose(logits, run(plain, tokens, merged), atol=2e-5 * np.abs(logits).max())


def test_a_change_is_scale_times_a_times_b(base, draw):
    config = dataclasses.replace(base, adapter=ADAPTERS["lora"])
    params = draw(config)
    merged = trees.flatten(model.merge(config, params))
    flat = trees.flatten(params)
    a, b = (np.float64(flat[f"adapter/blocks/0/attention/o/{name}"]) for name in "ab")
    wanted = flat["blocks/0/attention/o"] + 8 / 4 * np.einsum("lnhr,lrd->lnhd", a, b)
    np.testing.assert_allclose(merged["blocks/0/attention/o"], wanted, rtol=1e-6, atol=1e-6)


def test_the_scale():
    assert model.LoRA(rank=16, alpha=32.0).scale == 2
    assert model.LoRA(rank=16, alpha=32.0, rslora=True).scale == 8


def test_routers_and_vectors_have_no_lora(base):
    config = dataclasses.replace(base, adapter=model.LoRA(targets=("**",)), **EXPERTS)
    paths = [path for path in trees.flatten(model.shapes(config)) if path.startswith("adapter/")]
    assert not [path for path in paths if "router" in path or "norm" in path or "bias" in path]
    experts = trees.flatten(model.shapes(config))["adapter/blocks/0/ffn/down/a"]
    assert experts.shape == (base.layers, 4, 8, 16)


def test_dropout_acts_on_the_adapter_alone(base, draw, tokens):
    config = dataclasses.replace(base, adapter=model.LoRA(rank=4, dropout=0.5))
    params = first(config)

    def hidden(params, key):
        return Model(config, params)(tokens, dropout_key=key).hidden_btd

    key = jax.random.key(0)
    # b is zero: dropout changes nothing.
    np.testing.assert_array_equal(hidden(params, key), hidden(params, None))
    params = draw(config)
    assert np.any(hidden(params, key) != hidden(params, None))
    assert np.any(hidden(params, key) != hidden(params, jax.random.key(1)))
    np.testing.assert_array_equal(hidden(params, key), hidden(params, key))


@pytest.mark.parametrize("name", ["prefix", "encoder", "bottleneck"])
def test_other_adapters_cannot_be_merged(name, base, draw):
    config = dataclasses.replace(base, adapter=ADAPTERS[name])
    with pytest.raises(UserError, match=r"cannot be merged into the weights"):
        model.merge(config, draw(config))


# ---- Prefix tuning


def test_a_prefix_is_attention_to_more_keys(base, draw):
    """Against a softmax over trained and own keys in float64."""
    gqa = model.GQA(heads=4, kv_heads=2, head_dim=8, position=model.NoPosition(), softcap=20.0)
    config = dataclasses.replace(base, layers=1, attention=gqa, adapter=ADAPTERS["prefix"])
    params = trees.flatten(draw(config))
    attention = model.GroupedQueryAttention(gqa, base.dim, rngs=_rngs())
    prefix = gqa.build_prefix(3, 0.5, _rngs())
    attention.kv_prefix = prefix
    x_btd = jax.random.normal(jax.random.key(1), (1, 5, base.dim))
    y_btd, _ = attention(x_btd)

    q, k, v, o = (np.float64(getattr(attention, name).get_value()) for name in "qkvo")
    x_td = np.float64(x_btd[0])
    more_k, more_v = np.float64(prefix.k.get_value()), np.float64(prefix.v.get_value())
    out_tnh = np.zeros((5, 4, 8))
    for t in range(5):
        for n in range(4):
            keys = np.concatenate([more_k[:, n // 2], x_td[: t + 1] @ k[:, n // 2]])
            values = np.concatenate([more_v[:, n // 2], x_td[: t + 1] @ v[:, n // 2]])
            scores = 20 * np.tanh(keys @ (x_td[t] @ q[:, n]) * 8**-0.5 / 20)
            shares = np.exp(scores - scores.max())
            out_tnh[t, n] = shares / shares.sum() @ values
    wanted = np.einsum("tnh,nhd->td", out_tnh, o)
    np.testing.assert_allclose(y_btd[0], wanted, atol=1e-6 + 1e-5 * np.abs(wanted).max())
    assert params["adapter/blocks/0/attention/kv_prefix/k"].shape == (1, 3, 2, 8)


def _rngs():
    from flax import nnx

    return nnx.Rngs(0)


def test_an_encoder_computes_the_prefix(base, draw, run, tokens):
    encoder = dataclasses.replace(base, adapter=ADAPTERS["encoder"])
    params = draw(encoder)
    direct = dataclasses.replace(base, adapter=ADAPTERS["prefix"])
    computed = model.adapter_weights(encoder, params)
    rest = {p: x for p, x in trees.flatten(params).items() if not p.startswith("adapter/")}
    np.testing.assert_allclose(
        run(direct, tokens, trees.unflatten(rest | computed)),
        run(encoder, tokens, params),
        rtol=1e-5,
        atol=1e-5,
    )


# ---- Wrong declarations


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model.LoRA(rank=0), r"model\.adapter\.rank=0"),
        (lambda: model.LoRA(alpha=0.0), r"model\.adapter\.alpha=0"),
        (lambda: model.LoRA(dropout=1.0), r"model\.adapter\.dropout=1"),
        (lambda: model.Prefix(tokens=0), r"model\.adapter\.tokens=0"),
        (lambda: model.Prefix(hidden=0), r"model\.adapter\.hidden=0"),
        (lambda: model.Bottleneck(activation="swish"), r"model\.adapter\.activation='swish'"),
        (lambda: model.Bottleneck(after=()), r"model\.adapter\.after=\(\)"),
        (lambda: model.Bottleneck(after=("mlp",)), r"model\.adapter\.after='mlp'"),
        (lambda: quant.NF4(block=0), r"model\.quant\.block=0"),
        (lambda: quant.NF4(block=33), r"model\.quant\.block=33 must be even"),
    ],
)
def test_wrong_fields_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_target_that_matches_nothing_is_named(base):
    config = dataclasses.replace(base, adapter=model.LoRA(targets=("**/attention/query",)))
    with pytest.raises(UserError, match=r"targets='\*\*/attention/query' matches no matrix"):
        model.shapes(config)


def test_a_block_that_does_not_divide_the_width_is_named(base):
    config = dataclasses.replace(base, quant=quant.NF4(block=48))
    with pytest.raises(UserError, match=r"model\.quant\.block=48 does not divide"):
        model.shapes(config)
