"""The layer stack: scan, activation checkpointing (remat), parameter trees, dtypes, dropout and the
outputs of the forward pass."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from kernels_pallas import dispatch
from lm import model, trees

LOCAL = model.GQA(heads=4, kv_heads=2, head_dim=8, window=3)
MOE = model.MoE(experts=4, experts_per_token=2, hidden=8)
PATTERN = (model.Block(attention=LOCAL), model.Block())


def loss(config, params, tokens, remat="none"):
    hidden = model.Model(config, params, options=model.ForwardOptions(remat=remat))(
        tokens
    ).hidden_btd
    return jnp.square(model.Model(config, params).logits(hidden)).mean()


def relative(a, b):
    """Largest difference of two trees of arrays, relative to the largest entry of each leaf."""
    worst = jax.tree.map(lambda x, y: np.abs(x - y).max() / (np.abs(x).max() + 1e-12), a, b)
    return max(jax.tree.leaves(worst))


def test_scan_matches_unrolled_layers(base, run, tokens):
    """The same weights as one scan, as a pattern with a suffix, and as five single layers. The
    tolerance of 1e-5 is for sums in a different order."""
    scan = dataclasses.replace(base, layers=5)
    unrolled = dataclasses.replace(scan, prefix=(model.Block(),) * 5)
    pattern = dataclasses.replace(scan, pattern=(model.Block(),) * 2)
    assert scan.layout.repeats == 5 and unrolled.layout.repeats == 0
    assert pattern.layout.repeats == 2 and len(pattern.layout.suffix) == 1
    expected = run(scan, tokens)
    for other in (unrolled, pattern):
        np.testing.assert_allclose(run(other, tokens), expected, rtol=1e-5, atol=1e-5)


def test_blocks_of_a_pattern_alternate(base, run, tokens):
    """Local, global, local: matches the same three layers unrolled, and differs from the reversed
    pattern."""
    config = dataclasses.replace(base, layers=3, pattern=PATTERN)
    unrolled = dataclasses.replace(base, layers=3, prefix=(*PATTERN, PATTERN[0]))
    turned = dataclasses.replace(base, layers=3, pattern=PATTERN[::-1])
    expected = run(config, tokens)
    np.testing.assert_allclose(run(unrolled, tokens), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(run(turned, tokens) - expected).max() > 1e-2


@pytest.mark.slow
def test_remat_reduces_memory_and_does_not_change_gradients(base, draw, tokens):
    """For a scan and a single layer before it. Recomputed values may be summed in a different
    order: tolerance 1e-5."""
    config = dataclasses.replace(base, layers=9, prefix=(model.Block(),))
    params, tokens = draw(config), np.tile(tokens, (4, 8))
    gradients, sizes = {}, {}

    def hidden_loss(params, remat):
        return jnp.square(
            model.Model(config, params, options=model.ForwardOptions(remat=remat))(
                tokens
            ).hidden_btd
        ).mean()

    for remat in ("none", "dots", "attention", ("qkv", "attention_out", "ffn_hidden"), "block"):
        compiled = jax.jit(jax.grad(hidden_loss), static_argnums=1).lower(params, remat).compile()
        gradients[remat] = compiled(params)
        sizes[remat] = compiled.memory_analysis().temp_size_in_bytes
    for gradient in gradients.values():
        assert relative(gradients["none"], gradient) < 1e-5
    # 'dots' differs from 'none' only in attention, too little to measure at this size.
    assert sizes["block"] < 0.9 * min(sizes["dots"], sizes["none"])
    assert sizes["attention"] < min(sizes["dots"], sizes["none"])


KERNELS = {
    "none": 1,
    "dots": 1,
    "attention": 1,
    ("qkv", "attention"): 1,
    ("qkv", "ffn_hidden"): 2,
    "block": 2,
}


@pytest.mark.parametrize("remat", KERNELS, ids=str)
def test_saved_attention_is_not_recomputed(base, remat):
    """Counts the kernel calls in the gradient program."""
    attention = model.GQA(heads=2, kv_heads=1, head_dim=128)
    config = dataclasses.replace(base, attention=attention, layers=3)
    tokens = np.zeros((1, 256), np.int32)

    def total(params):
        return jnp.sum(
            model.Model(config, params, options=model.ForwardOptions(remat=remat))(
                tokens
            ).hidden_btd
            ** 2
        )

    with dispatch.only(None):
        jaxpr = jax.make_jaxpr(jax.grad(total))(model.shapes(config))
    calls = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "pallas_call"]
    names = [eqn.params["name"] for eqn in calls]
    assert names.count("flash_attention_forward") == KERNELS[remat]
    assert names.count("flash_attention_backward") == 1


def equations(jaxpr):
    """Yields all equations, including those of inner jaxprs."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_program_size_does_not_depend_on_the_number_of_layers(base, tokens):
    """Compares the number of characters of forward and backward, within 1 %, with remat and a
    pattern of two kinds of layers."""

    def size(layers: int) -> int:
        config = dataclasses.replace(base, layers=layers, pattern=PATTERN)

        def gradient(params):
            return jax.grad(lambda p: loss(config, p, tokens, "dots"))(params)

        return len(jax.jit(gradient).lower(model.shapes(config)).as_text())

    assert abs(size(8) / size(2) - 1) < 0.01


@pytest.mark.parametrize("parts", ["dense", "everything"])
def test_weights_shapes_and_axes_have_the_same_tree_structure(base, parts):
    config = base
    if parts == "everything":
        full = dataclasses.replace(
            base.attention,
            bias=True,
            out_bias=True,
            sinks=model.LearnedSinks(),
            qk_norm=model.QKNorm(norm=model.LayerNormConfig()),
        )
        config = dataclasses.replace(
            base,
            layers=6,
            attention=full,
            prefix=(model.Block(ffn=model.MLP(hidden=24, bias=True)),),
            pattern=(model.Block(ffn=MOE), model.Block()),
            placement="sandwich",
        )
    params = trees.flatten(model.init(config, jax.random.key(0)))
    shapes, axes = trees.flatten(model.shapes(config)), trees.flatten(model.axes(config))
    assert set(params) == set(shapes) == set(axes)
    for path, weight in params.items():
        assert type(path) is str and weight.dtype == jnp.float32
        assert weight.shape == shapes[path].shape and weight.ndim == len(axes[path])
        stacked = bool(re.match(r"blocks/\d+/", path))
        assert (axes[path][0] == "layers") == stacked
        if "norm/" not in path and "bias" not in path and not path.endswith("sinks"):
            assert np.std(weight) > 0, f"{path} is initialized to a constant"
            assert not stacked or np.abs(weight[0] - weight[-1]).max() > 0 or len(weight) == 1


def test_modifying_returned_axes_and_shapes_does_not_affect_later_calls(base):
    model.axes(base)["embed"].clear()
    model.shapes(base)["embed"].clear()
    assert model.axes(base)["embed"] and model.shapes(base)["embed"]


def test_tied_embeddings_match_an_untied_model_with_the_same_table(base, draw, run, tokens):
    tied = dataclasses.replace(base, tied=True)
    params = draw(tied)
    assert "unembed" not in params
    two = params | {"unembed": {"w": params["embed"]["table"].T}}
    np.testing.assert_allclose(
        run(tied, tokens, params), run(base, tokens, two), rtol=1e-5, atol=1e-5
    )


def test_compute_dtype_follows_the_weights(base, draw, run, tokens):
    """bfloat16 weights give bfloat16 hidden states and float32 logits close to those of float32
    weights. A bfloat16 number has 8 significant bits, and the errors of some dozen roundings add
    up."""
    params = draw(base)
    half = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), params)
    hidden = model.Model(base, half)(tokens).hidden_btd
    assert hidden.dtype == jnp.bfloat16
    logits = model.Model(base, half).logits(hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, run(base, tokens, params), atol=0.15)


def test_dropout_needs_a_key_and_depends_only_on_it(base, draw, tokens):
    """Disabled without a key. The same key gives the same mask, another key a different one."""
    config = dataclasses.replace(base, dropout=0.4)
    params = draw(config)

    @jax.jit
    def hidden(key=None):
        return model.Model(config, params)(tokens, dropout_key=key).hidden_btd

    plain = model.Model(base, params)(tokens).hidden_btd
    np.testing.assert_allclose(hidden(), plain, atol=1e-5)
    first, again, other = (hidden(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1 and np.abs(first - plain).max() > 0.1


def test_dropout_keeps_the_expected_fraction(base, draw, tokens):
    """All layers add zero, so only the dropout mask of the embedding remains. Over 2,000 draws, the
    fraction of kept entries is 0.6 within five standard errors."""
    config = dataclasses.replace(base, dropout=0.4, placement="post")
    params = jax.tree.map(np.zeros_like, draw(config)) | {"embed": {"table": np.ones((40, 16))}}
    ones = {"scale": np.ones((2, 16), np.float32)}
    for name in ("attention_out_norm", "ffn_out_norm"):
        params["blocks"]["0"][name] = ones
    keys = jax.random.split(jax.random.key(0), 2000)
    forward = jax.vmap(
        lambda key: model.Model(config, params)(tokens[:1, :1], dropout_key=key).hidden_btd
    )
    kept = np.asarray(forward(keys)) > 0
    assert abs(kept.mean() - 0.6) < 5 * np.sqrt(0.6 * 0.4 / kept.size)


def test_auxiliary_losses_and_expert_load(base, draw, tokens):
    """One scalar per auxiliary loss, summed over layers; the load of each MoE layer under the path
    of its weights."""
    config = dataclasses.replace(
        base,
        layers=6,
        ffn=dataclasses.replace(MOE, z_loss=1e-3),
        prefix=(model.Block(ffn=model.SwiGLU(hidden=24)),),
        pattern=(model.Block(), model.Block(ffn=model.SwiGLU(hidden=24))),
    )
    statistics = model.Model(config, draw(config))(tokens).statistics
    losses, loads = model.auxiliary(config, statistics)
    assert {path: load.shape for path, load in loads.items()} == {
        "blocks/0/ffn": (2, 4),
        "suffix/0/ffn": (4,),
    }
    for load in loads.values():
        np.testing.assert_allclose(load.sum(-1), 1, rtol=1e-5)
    assert set(losses) == {"balance", "router_z"}
    assert all(value.shape == () and value > 0 for value in losses.values())
    dense = model.Model(base, draw(base))(tokens)
    assert dense.statistics == {} and dense.cache is None


def test_padding_is_excluded_from_the_expert_load(base, draw, tokens):
    config = dataclasses.replace(base, ffn=MOE)
    params, segments = draw(config), np.ones_like(tokens)
    segments[:, 8:] = 0
    apply = model.Model(config, params)
    padded = model.auxiliary(config, apply(tokens, segments_bt=segments).statistics)
    short = model.auxiliary(config, apply(tokens[:, :8]).statistics)
    (padded_losses, padded_load), (losses, load) = padded, short
    np.testing.assert_allclose(padded_load["blocks/0/ffn"], load["blocks/0/ffn"], atol=1e-6)
    np.testing.assert_allclose(padded_losses["balance"], losses["balance"], rtol=1e-5)


def test_update_balance_changes_only_router_biases(base, draw, tokens):
    config = dataclasses.replace(
        base, ffn=dataclasses.replace(MOE, balance=model.BiasBalance(rate=0.01))
    )
    params = jax.tree.map(jnp.asarray, draw(config))
    _, load = model.auxiliary(config, model.Model(config, params)(tokens).statistics)
    moved = trees.flatten(model.update_balance(config, params, load))
    bias = "blocks/0/ffn/bias"
    for path, weight in trees.flatten(params).items():
        assert (path == bias) != np.array_equal(weight, moved[path])
    step = np.asarray(moved[bias] - trees.flatten(params)[bias])
    np.testing.assert_allclose(np.abs(step[step != 0]), 0.01, rtol=1e-4)
    assert np.all(step[np.asarray(load["blocks/0/ffn"]) > 0.25 + 1e-6] < 0)

    dense = draw(base)
    assert relative(dense, model.update_balance(base, dense, {})) == 0


def test_initial_weights_have_the_configured_standard_deviation(base):
    """Within 10 %, at a few thousand entries per weight."""
    wide = dataclasses.replace(
        base,
        dim=64,
        layers=8,
        attention=model.MHA(heads=4, head_dim=16),
        ffn=model.ReLU2(hidden=256),
        embed_std=0.5,
    )
    expected = {
        model.Normal(std=0.1): (0.1, 0.1),
        model.ScaledNormal(std=0.1): (0.1, 0.1 / 4),  # two sublayers in each of eight layers
        model.Xavier(): ((2 / 320) ** 0.5, (2 / 320) ** 0.5),
        model.He(): ((2 / 64) ** 0.5, (2 / 256) ** 0.5),
        model.He(gain=1.0): ((1 / 64) ** 0.5, (1 / 256) ** 0.5),
        model.TruncatedNormal(std=0.1): (0.0987, 0.0987),  # truncation at three sigma keeps 0.987
    }
    for init, (up, down) in expected.items():
        config = dataclasses.replace(wide, init=init)
        params = trees.flatten(model.init(config, jax.random.key(0)))
        np.testing.assert_allclose(np.std(params["blocks/0/ffn/up"]), up, rtol=0.1)
        np.testing.assert_allclose(np.std(params["blocks/0/ffn/down"]), down, rtol=0.1)
        np.testing.assert_allclose(np.std(params["embed/table"]), 0.5, rtol=0.1)
        if isinstance(init, model.TruncatedNormal):
            assert np.abs(params["blocks/0/ffn/up"]).max() <= 0.3


def test_initial_weights_do_not_depend_on_the_shape_they_are_drawn_in():
    """Drawn flat, as on one device, or in their own shape, as on several devices: the same
    numbers."""
    init, shape, key = model.Normal(std=1.0).build(1).reads(8, 24), (3, 8, 4, 6), jax.random.key(5)
    np.testing.assert_array_equal(init(key, shape, "float32"), jax.random.normal(key, shape))


def test_effective_norm_scales_start_at_one(base):
    """In the 1 + w form the weight starts at zero, and the network is the same as with scales of
    one."""
    offset = dataclasses.replace(base, norm=model.RMSNormConfig(offset=1.0))
    start = model.init(offset, jax.random.key(0))
    assert not np.any(start["final_norm"]["scale"])
    x = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    plain = model.init(base, jax.random.key(0))
    np.testing.assert_allclose(
        model.Model(offset, start)(x).hidden_btd,
        model.Model(base, plain)(x).hidden_btd,
        rtol=1e-5,
        atol=1e-6,
    )


def test_cache_cannot_be_combined_with_segments(base, draw, tokens):
    cache = model.init_cache(base, 2, 16)
    with pytest.raises(ValueError, match="segments_bt or cache"):
        model.Model(base, draw(base))(tokens, segments_bt=np.ones_like(tokens), cache=cache)


def test_cache_dtype_may_differ_from_the_compute_dtype(base, draw, tokens):
    params = draw(base)
    cache = model.init_cache(base, 2, 16, jnp.bfloat16)
    out = model.Model(base, params)(tokens, cache=cache)
    assert {leaf.dtype for leaf in jax.tree.leaves(out.cache)} == {jnp.dtype(jnp.bfloat16)}
    assert out.hidden_btd.dtype == jnp.float32
