"""Each Flax module on its own, as in a notebook: construct, call, differentiate and print it."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lm.model
from lm import model, trees
from lm.runs import Run

DIM, VOCAB, B, T = 16, 40, 2, 6
GQA = model.GQA(heads=4, kv_heads=2, head_dim=8)
MOE = model.MoE(experts=4, experts_per_token=2, hidden=8, shared=model.Shared(hidden=8))
CONFIG = model.Config(vocab=VOCAB, dim=DIM, layers=2, attention=GQA, ffn=model.SwiGLU(hidden=24))

# name -> (constructor, kind of input, shape of the first output)
HIDDEN = (B, T, DIM)
MODULES = {
    "Embedding": (lambda rngs: model.Embedding(CONFIG, rngs=rngs), "tokens", HIDDEN),
    "FeedForward": (lambda rngs: model.FeedForward(DIM, 24, rngs=rngs), "hidden", HIDDEN),
    "GatedMLP": (lambda rngs: model.GatedMLP(DIM, 24, bias=True, rngs=rngs), "hidden", HIDDEN),
    "GroupedQueryAttention": (
        lambda rngs: model.GroupedQueryAttention(GQA, DIM, rngs=rngs),
        "hidden",
        HIDDEN,
    ),
    "LayerNorm": (lambda rngs: model.LayerNorm(DIM, rngs=rngs), "hidden", HIDDEN),
    "MixtureOfExperts": (
        lambda rngs: model.MixtureOfExperts(MOE, DIM, rngs=rngs),
        "hidden",
        HIDDEN,
    ),
    "RMSNorm": (lambda rngs: model.RMSNorm(DIM, rngs=rngs), "hidden", HIDDEN),
    "RotaryEmbedding": (
        lambda rngs: model.RotaryEmbedding(model.RoPE(), 8),
        "heads",
        (B, T, 4, 8),
    ),
    "Transformer": (lambda rngs: model.Transformer(CONFIG, rngs=rngs), "tokens", HIDDEN),
    "TransformerBlock": (lambda rngs: model.TransformerBlock(CONFIG, rngs=rngs), "hidden", HIDDEN),
}


def inputs(kind: str) -> jax.Array:
    random = np.random.default_rng(0)
    if kind == "tokens":
        return jnp.asarray(random.integers(0, VOCAB, (B, T)), jnp.int32)
    shape = (B, T, DIM) if kind == "hidden" else (B, T, 4, 8)
    return jnp.asarray(random.standard_normal(shape), jnp.float32)


def first(output) -> jax.Array:
    return output[0] if isinstance(output, tuple) else output


def test_every_exported_module_is_tested():
    exported = [getattr(lm.model, name) for name in lm.model.__all__]
    modules = {
        each.__name__ for each in exported if inspect.isclass(each) and issubclass(each, nnx.Module)
    }
    assert modules == MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_module_can_be_called_differentiated_and_printed(name):
    build, kind, shape = MODULES[name]
    module, x = build(nnx.Rngs(0)), inputs(kind)
    assert type(module).__name__ == name

    def loss(module, x):
        y = first(module(x))
        return jnp.sum(y**3), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(module, x)
    assert y.shape == shape and y.dtype == jnp.float32
    assert np.isfinite(y).all() and np.ptp(y) > 0

    assert jax.tree.structure(grads) == jax.tree.structure(module)
    weights, gradients = (jax.tree.leaves(each) for each in (module, grads))
    assert [w.shape for w in weights] == [g.shape for g in gradients]
    assert bool(weights) == (name != "RotaryEmbedding")
    unused = {"Transformer": 1}.get(name, 0)  # the output projection
    assert sum(not np.any(g) for g in gradients) == unused

    shown = repr(module)
    assert name in shown and len(shown.splitlines()) <= 200


def test_nnx_split_and_merge_give_the_same_gradients():
    module, x = MODULES["GatedMLP"][0](nnx.Rngs(0)), inputs("hidden")
    graph, state = nnx.split(module)

    @jax.jit
    def both(module, state):
        loss = lambda module: jnp.sum(module(x) ** 3)  # noqa: E731
        return jax.grad(loss)(module), jax.grad(lambda s: loss(nnx.merge(graph, s)))(state)

    of_module, of_state = both(module, state)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, (of_module, of_state)))


def test_modules_of_one_config_have_the_same_tree_structure():
    """This lets jax.tree.map average two modules, and jax.jit compile once for both."""
    one, two = (model.Transformer(CONFIG, rngs=nnx.Rngs(seed)) for seed in range(2))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, two)
    assert jax.tree.structure(mean) == jax.tree.structure(one)
    table = (one.embed.table.get_value() + two.embed.table.get_value()) / 2
    np.testing.assert_array_equal(mean.embed.table.get_value(), table)


def test_manual_gradient_descent_step_lowers_the_loss():
    """The step treats the module as a pytree."""
    module, x = MODULES["TransformerBlock"][0](nnx.Rngs(0)), inputs("hidden")

    @jax.jit
    def value_and_grad(module):
        return jax.value_and_grad(lambda module: jnp.mean(module(x)[0] ** 2))(module)

    before, grads = value_and_grad(module)
    after, _ = value_and_grad(jax.tree.map(lambda w, g: w - 0.1 * g, module, grads))
    assert after < before


@pytest.mark.parametrize("ffn", [CONFIG.ffn, MOE], ids=["dense", "moe"])
def test_transformer_module_and_model_give_equal_logits(ffn):
    """`Transformer` and `Model` with the same weights give bitwise equal logits."""
    config = model.Config(vocab=VOCAB, dim=DIM, layers=2, attention=GQA, ffn=ffn)
    module, tokens_bt = model.Transformer(config, rngs=nnx.Rngs(0)), inputs("tokens")
    params = nested(module)
    shapes, own = (trees.flatten(tree) for tree in (model.shapes(config), params))
    assert {path: x.shape for path, x in shapes.items()} == {p: x.shape for p, x in own.items()}

    @jax.jit
    def logits(each, tokens_bt):
        return each.logits(each(tokens_bt).hidden_btd)

    value = model.Model(config, params)
    expected = logits(module, tokens_bt)
    np.testing.assert_array_equal(logits(value, tokens_bt), expected)
    np.testing.assert_array_equal(logits(value.module(), tokens_bt), expected)


def nested(module: nnx.Module) -> dict:
    """The weights of a module in the nested dict format of `model.init`."""
    flat = nnx.to_flat_state(nnx.state(module))
    return trees.unflatten({"/".join(map(str, path)): w.get_value() for path, w in flat})


def test_model_of_a_loaded_run_is_a_transformer(tiny):
    run = lm.load(tiny.folder)
    assert isinstance(run, Run) and type(run.model) is model.Transformer
    tokens_bt = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(
        run.model.logits(run.model(jnp.asarray(tokens_bt)).hidden_btd).argmax(-1),
        run.logits(tokens_bt).argmax(-1),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Penalized(model.FeedForwardConfig):
    """A user-defined feed-forward with an auxiliary loss: half the mean square of its output."""

    def build(self, dim, rngs, init=None):
        return _Penalized(dim, rngs)

    def measures(self, sums):
        return {"square": 0.5 * sums["square"] / sums["count"]}, None


class _Penalized(nnx.Module):
    def __init__(self, dim, rngs):
        self.w = model.param(rngs, (dim, dim), ("embed", "mlp"), jax.nn.initializers.ones)

    def __call__(self, x_btd, mask_bt=None):
        y_btd = model.einsum("btd,df->btf", x_btd, self.w)
        return y_btd, {"square": jnp.square(y_btd).sum(), "count": jnp.float32(y_btd.size)}


def test_user_defined_feed_forward_reports_its_auxiliary_loss():
    config = model.Config(
        vocab=8,
        dim=4,
        layers=2,
        attention=model.GQA(heads=1, kv_heads=1, head_dim=4),
        ffn=Penalized(),
    )
    output = model.Model(config, model.init(config, jax.random.key(0)))(jnp.zeros((1, 3), int))
    losses, load = model.auxiliary(config, output.statistics)
    assert losses["square"] > 0 and load == {}
