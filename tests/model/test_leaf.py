"""Every weight may be a custom leaf type, such as a quantized array or an adapter: all products
with weights go through lm/model/param.py."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import model, objectives, precision, trees
from lm.data.batch import Batch
from lm.generate import Sampling, generate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(trees.Leaf):
    """int8 values times one scale per entry of the last axis."""

    values: jax.Array
    scale: jax.Array
    dtype: Any = dataclasses.field(default=jnp.dtype("float32"), metadata={"static": True})

    @property
    def shape(self):
        return self.values.shape

    def dense(self):
        return (self.values * self.scale).astype(self.dtype)

    def astype(self, dtype):
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    @classmethod
    def of(cls, w, stack):
        """`stack` is the number of leading layer axes."""
        rest = tuple(range(stack, w.ndim - 1))
        scale = np.abs(w).max(axis=rest, keepdims=True) / 127
        return cls(jnp.int8(np.round(w / scale)), jnp.float32(scale))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(trees.Leaf):
    """base + a @ b, where all axes but the last are flattened into one."""

    base: trees.Leaf
    a: jax.Array
    b: jax.Array

    shape = property(lambda self: self.base.shape)
    dtype = property(lambda self: self.base.dtype)

    def dense(self):
        return self.base.dense() + self.change()

    def change(self):
        return (self.a @ self.b).reshape(self.shape)

    def einsum(self, equation, x, axes, product):
        return jnp.einsum(equation, x, self.base.dense()) + jnp.einsum(equation, x, self.change())

    def astype(self, dtype):
        return LowRank(self.base.astype(dtype), self.a.astype(dtype), self.b.astype(dtype))

    @classmethod
    def of(cls, w, stack):
        draw, layers = np.random.default_rng(w.size), w.shape[:stack]
        rows = math.prod(w.shape[stack:-1])
        a, b = draw.standard_normal((*layers, rows, 2)), draw.standard_normal((2, w.shape[-1]))
        b = np.broadcast_to(0.1 * b, (*layers, *b.shape))
        return cls(Int8.of(w, stack), jnp.float32(a), jnp.float32(b))


def replaced(params, kind):
    """The same weights, each converted to a leaf of this type."""
    return trees.map_with_path(lambda path, w: kind.of(w, int(path.startswith("blocks/"))), params)


def materialized(leaves):
    return jax.tree.map(lambda leaf: leaf.dense(), leaves, is_leaf=trees.is_leaf)


CONFIGS = {
    # With biases, sinks, layer norms, a router bias and a gated shared expert.
    "most": {
        "attention": model.GQA(
            heads=4, kv_heads=2, head_dim=8, bias=True, out_bias=True, sinks=model.LearnedSinks()
        ),
        "ffn": model.MoE(
            experts=4,
            experts_per_token=2,
            hidden=8,
            shared=model.Shared(hidden=8, gated=True),
            balance=model.BiasBalance(),
        ),
        "prefix": (model.Block(ffn=model.MLP(hidden=24, bias=True)),),
        "norm": model.LayerNormConfig(),
    },
    "tied": {
        "attention": model.GQA(
            heads=4, kv_heads=2, head_dim=8, qk_norm=model.QKNorm(norm=model.RMSNormConfig())
        ),
        "ffn": model.SwiGLU(hidden=24, bias=True),
        "placement": "sandwich",
        "tied": True,
    },
    "capacity": {
        "ffn": model.MoE(
            experts=4, experts_per_token=2, hidden=8, dispatch=model.Capacity(factor=2.0)
        ),
    },
}
KINDS = [Int8, LowRank]
BF16 = jnp.dtype("bfloat16")


@pytest.fixture(params=CONFIGS)
def config(request, base):
    return dataclasses.replace(base, **CONFIGS[request.param])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_match_the_dense_arrays(kind, config, draw, run, tokens):
    params = draw(config)
    leaves = replaced(params, kind)
    assert len(jax.tree.leaves(leaves, is_leaf=trees.is_leaf)) == len(jax.tree.leaves(params))
    logits = run(config, tokens, leaves)
    # Two programs compute the same numbers with float32 sums in different orders.
    np.testing.assert_allclose(logits, run(config, tokens, materialized(leaves)), atol=1e-4)
    assert np.abs(logits - run(config, tokens, params)).max() > 1e-3, (
        "the custom leaves have no effect"
    )


def of_tokens(tokens) -> Batch:
    ones = np.ones_like(tokens)
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(tokens, np.roll(tokens, -1, axis=1), ones.astype(np.float32), ones, places)


@pytest.mark.slow
def test_gradients_reach_every_adapter(base, draw, tokens):
    """Expected values follow by the chain rule from the gradient of the dense weight: dA = dW B^T,
    dB = A^T dW."""
    config, batch = dataclasses.replace(base, **CONFIGS["most"]), of_tokens(tokens)
    leaves = replaced(draw(config), LowRank)

    def loss(params):
        return objectives.NextToken().loss(model.Model(config, params), batch, None, {}).total

    def of_adapters(factors):
        a_and_b = zip(jax.tree.leaves(leaves, is_leaf=trees.is_leaf), factors, strict=True)
        return loss(structure.unflatten([LowRank(leaf.base, *ab) for leaf, ab in a_and_b]))

    flat, structure = jax.tree.flatten(leaves, is_leaf=trees.is_leaf)
    grads = jax.jit(jax.grad(of_adapters))([(leaf.a, leaf.b) for leaf in flat])
    dense_grads = jax.tree.leaves(jax.jit(jax.grad(loss))(materialized(leaves)))
    paths = list(trees.flatten(leaves))
    for path, leaf, (da, db), dw in zip(paths, flat, grads, dense_grads, strict=True):
        dw = np.asarray(dw).reshape(*leaf.a.shape[:-1], leaf.shape[-1])
        wanted = dw @ np.swapaxes(leaf.b, -1, -2), np.swapaxes(leaf.a, -1, -2) @ dw
        for got, want in zip((da, db), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max() + 1e-6)
        # The balancing bias of a router has no gradient.
        assert np.any(dw) != path.endswith("ffn/bias"), path


@pytest.mark.parametrize("kind", KINDS)
def test_casting_preserves_the_leaf_type(kind, base, draw, run, tokens):
    leaves = replaced(draw(base), kind)
    half = precision.cast(leaves, "bfloat16")
    flat = jax.tree.leaves(half, is_leaf=trees.is_leaf)
    assert all(type(leaf) is kind for leaf in flat)
    assert {leaf.dtype for leaf in flat} == {leaf.dense().dtype for leaf in flat} == {BF16}
    integers = [x for x in jax.tree.leaves(half) if x.dtype == jnp.int8]
    assert len(integers) == len(flat)
    # Model casts to its declared precision. bfloat16 has a relative rounding error of 2^-9, which
    # accumulates over several operations.
    apply = model.Model(base, leaves, precision=precision.BF16)
    assert jax.tree.structure(apply.cast().params) == jax.tree.structure(half)
    hidden_btd = jax.jit(lambda apply: apply(tokens).hidden_btd)(apply)
    assert hidden_btd.dtype == BF16
    logits, exact = jax.jit(model.Model.logits)(apply, hidden_btd), run(base, tokens, leaves)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


def test_generation_works_with_custom_leaves(base, draw):
    leaves = replaced(draw(base), LowRank)
    options = {"context": 16, "max_tokens": 6, "sampling": Sampling(temperature=0)}
    prompts = [[1, 2, 3], [4]]
    ours, dense = (
        generate(model.Model(base, params), prompts, **options)
        for params in (leaves, materialized(leaves))
    )
    assert [result.tokens for result in ours] == [result.tokens for result in dense]
    for a, b in zip(ours, dense, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_flax_module_works_with_custom_leaves(base, draw, tokens):
    """Calls and prints a Flax module whose weights are custom leaves."""
    module = model.Model(base, replaced(draw(base), LowRank)).module()
    assert isinstance(module, model.Transformer)
    assert module(tokens).hidden_btd.shape == (*tokens.shape, base.dim)
    assert "LowRank" in repr(module)
