"""The transformer: tokens [B, T] in, hidden states [B, T, D] out (Vaswani et al.,
arXiv:1706.03762).

Outside this room a model is a nested dict of arrays:

    embed/table  prefix/0/...  blocks/0/...  suffix/0/...  final_norm/...  unembed/w

`blocks` has one entry per block of the repeated pattern, whose arrays have a leading axis of the
repeats; they run as one scan, so that the compiled program does not grow with the number of layers.
`prefix` and `suffix` are single layers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from lm import trees
from lm.errors import Refused, check_name
from lm.mesh import REMAT
from lm.model.attention import Cache, Positions
from lm.model.config import Block, Config
from lm.model.moe import BiasBalance, update_bias
from lm.model.param import normal, param
from lm.model.rope import RoPE
from lm.sharding import active_mesh, batch_sharding, shard, token_axes

Params = dict[str, Any]
Losses = dict[str, jax.Array]


class Output(NamedTuple):
    """Of `forward`.

    hidden_btd  after the final norm
    losses      side losses of MoE layers, weighted and summed over layers, each a mean over tokens;
                {} when dense
    load        {path of an MoE's parameters: share of the choices that each expert got, [E] or
                [repeats, E]}
    cache       with this call's keys and values; None when none was given
    """

    hidden_btd: jax.Array
    losses: Losses
    load: dict[str, jax.Array]
    cache: dict[str, Any] | None


class Layer(nnx.Module):
    """Attention and feed-forward, each added to the residual stream. `_norm` stands before,
    `_out_norm` after."""

    def __init__(self, block: Block, config: Config, rngs: nnx.Rngs):
        self.placement, self.dropout = config.placement, config.dropout
        init = config.init.build(config.layers)
        before = config.placement in ("pre", "sandwich")
        after = config.placement != "pre"
        self.attention_norm = config.norm.build(config.dim, rngs) if before else None
        self.attention = block.attention.build(config.dim, rngs, init)
        self.attention_out_norm = config.norm.build(config.dim, rngs) if after else None
        self.ffn_norm = config.norm.build(config.dim, rngs) if before else None
        self.ffn = block.ffn.build(config.dim, rngs, init)
        self.ffn_out_norm = config.norm.build(config.dim, rngs) if after else None

    def __call__(
        self, x_btd: jax.Array, positions: Positions, cache: Cache | None, key: jax.Array | None
    ) -> tuple[jax.Array, Cache | None, Losses, jax.Array | None]:
        keys = (None, None) if key is None else jax.random.split(key)
        h_btd = x_btd if self.attention_norm is None else self.attention_norm(x_btd)
        h_btd, cache = self.attention(h_btd, positions, cache)
        x_btd = self._add(x_btd, h_btd, self.attention_out_norm, keys[0])
        h_btd = x_btd if self.ffn_norm is None else self.ffn_norm(x_btd)
        h_btd, losses, load_e = self.ffn(h_btd, positions.mask_bt)
        x_btd = self._add(x_btd, h_btd, self.ffn_out_norm, keys[1])
        return shard(x_btd, "batch", "seq", "embed"), cache, losses, load_e

    def _add(
        self, x_btd: jax.Array, h_btd: jax.Array, norm: Callable | None, key: jax.Array | None
    ) -> jax.Array:
        if self.placement == "post":
            return norm(x_btd + _dropout(h_btd, self.dropout, key))
        if norm is not None:
            h_btd = norm(h_btd)
        return x_btd + _dropout(h_btd, self.dropout, key)


def _dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Srivastava et al. 2014, scaled so that the mean stays; the identity without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


class Embedding(nnx.Module):
    """tokens_bt -> x_btd."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        shape, init = (config.vocab, config.dim), normal(config.embed_std)
        self.table = param(rngs, shape, ("vocab", "embed"), init)
        self.scale = config.embed_scale

    def __call__(self, tokens_bt: jax.Array) -> jax.Array:
        x_btd = _look_up(self.table[...], tokens_bt)
        return x_btd if self.scale is None else x_btd * jnp.asarray(self.scale, x_btd.dtype)


def _look_up(table_vd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    """x_btd. Each device looks up its part of the width for the tokens of all the devices that
    share the table, and they exchange what they found: tokens and activations travel, which are
    small beside the table and its gradient."""
    mesh = active_mesh()
    if mesh is None or mesh.shape["fsdp"] == 1:
        return table_vd[tokens_bt]

    def on_each_device(table_vd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
        tokens_bt = jax.lax.all_gather(tokens_bt, "fsdp", axis=0, tiled=True)
        return jax.lax.all_to_all(table_vd[tokens_bt], "fsdp", 0, 2, tiled=True)

    tokens = batch_sharding(mesh).spec
    return jax.shard_map(
        on_each_device,
        mesh=mesh,
        # Only those of several devices: XLA refuses to mix automatic axes with manual ones of one.
        axis_names=set(token_axes(mesh)),
        in_specs=(PartitionSpec(None, "fsdp"), tokens),
        out_specs=tokens,
    )(table_vd, tokens_bt)


class Unembedding(nnx.Module):
    """Holds w_dv."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        init = config.init.build(config.layers).reads(config.dim, config.vocab)
        self.w = param(rngs, (config.dim, config.vocab), ("embed", "vocab"), init)


class Model(nnx.Module):
    """Every weight of a config, with those of `blocks` stacked."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        layout = config.layout

        def stack(block: Block) -> Layer:
            keys = jax.random.split(rngs.params(), layout.repeats)
            return jax.vmap(lambda key: Layer(block, config, nnx.Rngs(params=key)))(keys)

        self.embed = Embedding(config, rngs)
        self.prefix = nnx.List([Layer(block, config, rngs) for block in layout.prefix])
        self.blocks = nnx.List([stack(block) for block in layout.pattern if layout.repeats])
        self.suffix = nnx.List([Layer(block, config, rngs) for block in layout.suffix])
        last = config.placement != "post"
        self.final_norm = config.norm.build(config.dim, rngs) if last else None
        self.unembed = None if config.tied else Unembedding(config, rngs)


class Declaration(NamedTuple):
    """Of a model: the structure of its module, and a shape, logical axes and an initialiser for
    every weight, stacks included."""

    graph: Any
    shapes: Params
    axes: Params
    inits: Params


@functools.lru_cache(maxsize=64)
def _declaration(config: Config) -> Declaration:
    """Nothing is allocated."""
    model = jax.eval_shape(lambda key: Model(config, nnx.Rngs(params=key)), jax.random.key(0))
    graph, state = nnx.split(model)

    def names(path: str, weight: nnx.Param) -> tuple[str, ...]:
        stacked = ("layers",) if path.startswith("blocks/") else ()
        return stacked + weight.get_metadata()["axes"]

    return Declaration(
        graph=graph,
        shapes=trees.map_with_path(lambda path, weight: weight.get_value(), state),
        axes=trees.map_with_path(names, state),
        inits=trees.map_with_path(lambda path, weight: weight.get_metadata()["init"], state),
    )


def _module(config: Config, params: Params) -> Model:
    """The module that holds these arrays."""

    def keyed(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {int(k) if k.isdigit() else k: keyed(v) for k, v in tree.items()}

    return nnx.merge(_declaration(config).graph, keyed(params))


def init(config: Config, key: jax.Array) -> Params:
    """Fresh float32 weights. Under `jax.jit(init, static_argnums=0, out_shardings=...)` they are
    born sharded."""
    model = _declaration(config)
    keys = iter(jax.random.split(key, len(trees.flatten(model.shapes))))
    return trees.map_with_path(
        lambda path, x, draw: draw(next(keys), x.shape, x.dtype), model.shapes, model.inits
    )


def shapes(config: Config) -> Params:
    """A jax.ShapeDtypeStruct for every weight."""
    return trees.map_with_path(lambda path, shape: shape, _declaration(config).shapes)


def axes(config: Config) -> Params:
    """A tuple of logical axis names for every weight (see lm.sharding)."""
    return trees.map_with_path(lambda path, names: names, _declaration(config).axes)


def forward(
    config: Config,
    params: Params,
    tokens_bt: jax.Array,
    *,
    segments_bt: jax.Array | None = None,
    positions_bt: jax.Array | None = None,
    cache: dict[str, Any] | None = None,
    dropout_key: jax.Array | None = None,
    remat: str = "none",
) -> Output:
    """Hidden states of the tokens; computes in the dtype of `params`.

    Args:
      segments_bt: the document of each token; attention stays within documents. None: each row is
        one document.
      positions_bt: place in its document, from 0; None: in its row. With a cache also the slot that
        the token's key and value are written to, where a slot beyond the cache's length writes
        nothing, as padding should.
      cache: of `init_cache`, or of an earlier call's Output; queries see its slots up to their own
        position.
      dropout_key: a jax.random.key; None turns dropout off.
      remat: what the backward pass computes anew: 'none' only what is element-wise; 'dots' all but
        matrix products with weights; 'block' all but each layer's input.
    """
    check_name("remat", remat, REMAT)
    if cache is not None and segments_bt is not None:
        raise ValueError("a cache holds one document per row: give either segments_bt or cache")
    model = _module(config, jax.tree.map(jnp.asarray, params))
    if positions_bt is None:
        rows = 1 if cache is None else tokens_bt.shape[0]
        positions_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), (rows, tokens_bt.shape[1]))
    slots_bt = None if cache is None else positions_bt
    mask_bt = None if segments_bt is None else segments_bt != 0
    positions = Positions(segments_bt, slots_bt, mask_bt, _rope_tables(config, positions_bt))

    def apply(layer, x_btd, layer_cache, number, in_scan):
        run = _remat(lambda *a: a[0](a[1], positions, *a[2:]), remat, in_scan)
        return run(layer, x_btd, layer_cache, _fold(dropout_key, 1 + number))

    x_btd = _dropout(model.embed(tokens_bt), config.dropout, _fold(dropout_key, 0))
    x_btd = shard(x_btd, "batch", "seq", "embed")
    sides, caches, number = {}, {}, 0
    for name, run in (("prefix", _one_by_one), ("blocks", _scan), ("suffix", _one_by_one)):
        if layers := tuple(getattr(model, name)):
            given = {} if cache is None else cache[name]
            x_btd, new, sides[name] = run(apply, layers, x_btd, given, number)
            number += len(layers) * (config.layout.repeats if name == "blocks" else 1)
            if cache is not None:
                caches[name] = new
    sides = {f"{name}/{i}/ffn": side for name, part in sides.items() for i, side in part.items()}
    return Output(
        hidden_btd=x_btd if model.final_norm is None else model.final_norm(x_btd),
        losses=_total([losses for losses, _ in sides.values()]),
        load={path: load for path, (_, load) in sides.items() if load is not None},
        cache=caches or None,
    )


Caches = dict[str, Any]
Sides = dict[str, tuple[Losses, jax.Array | None]]


def _one_by_one(
    apply: Callable,
    layers: tuple[Layer, ...],
    x_btd: jax.Array,
    caches: Caches,
    first: int | jax.Array,
    repeat: jax.Array | None = None,
) -> tuple[jax.Array, Caches, Sides]:
    """Layers one after another, numbered from `first`; inside a scan `repeat` tells their place in
    stacked caches."""
    sides = {}
    for i, layer in enumerate(layers):
        cache = Cache(**caches[str(i)], layer=repeat) if caches else None
        x_btd, cache, *side = apply(layer, x_btd, cache, first + i, repeat is not None)
        sides[str(i)] = tuple(side)
        if cache is not None:
            caches = caches | {str(i): {"k": cache.k, "v": cache.v}}
    return x_btd, caches, sides


def _scan(
    apply: Callable, layers: tuple[Layer, ...], x_btd: jax.Array, caches: Caches, first: int
) -> tuple[jax.Array, Caches, Sides]:
    """The repeated pattern, with stacked weights. Caches are carried, so that each step writes its
    keys in place."""

    def repeat(carry, xs):
        i, group = xs
        *carry, sides = _one_by_one(apply, group, *carry, first + i * len(group), i)
        return tuple(carry), sides

    repeats = jax.tree.leaves(layers)[0].shape[0]
    carry, sides = jax.lax.scan(repeat, (x_btd, caches), (jnp.arange(repeats), layers))
    return *carry, sides


# What costs less to compute anew than to write and read back.
_ELEMENTWISE = {
    "add", "sub", "mul", "div", "neg", "max", "min", "square", "integer_pow", "sqrt", "rsqrt",
    "exp", "log", "tanh", "erf", "logistic", "cos", "sin", "select_n", "convert_element_type",
    "broadcast_in_dim", "reshape", "transpose", "squeeze", "concatenate", "slice", "split",
    "reduce_sum", "sharding_constraint",
}  # fmt: skip


def _remat(function: Callable, name: str, in_scan: bool) -> Callable:
    policy = {
        "none": lambda primitive, *_, **__: primitive.name not in _ELEMENTWISE,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "block": None,
    }[name]
    # A scan already keeps the two passes apart; elsewhere XLA would merge them and undo the saving.
    return jax.checkpoint(function, policy=policy, prevent_cse=not in_scan)


def _fold(key: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, number)


def _rope_tables(config: Config, positions_bt: jax.Array) -> dict[Any, Any]:
    used = {(block.attention.position, block.attention.head_dim) for block in config.layout.blocks}
    return {
        (position, head_dim): position.table(positions_bt, head_dim)
        for position, head_dim in used
        if isinstance(position, RoPE)
    }


def _total(losses: list[Losses]) -> Losses:
    """Summed over layers, by name."""
    total: Losses = {}
    for one in losses:
        total |= {name: total.get(name, 0.0) + jnp.sum(value) for name, value in one.items()}
    return total


def unembedding(config: Config, params: Params) -> jax.Array:
    """w_dv: logits are hidden_btd @ w_dv, soft-capped by `config.logit_softcap` where that is
    set."""
    return params["embed"]["table"].T if config.tied else params["unembed"]["w"]


def logits(config: Config, params: Params, hidden_btd: jax.Array) -> jax.Array:
    """[B, T, V] in float32, from the hidden states of `forward`."""
    w_dv = unembedding(config, params)
    z_btv = jnp.einsum("btd,dv->btv", hidden_btd, w_dv, preferred_element_type=jnp.float32)
    z_btv = shard(z_btv, "batch", "seq", "vocab")
    cap = config.logit_softcap
    return z_btv if cap is None else cap * jnp.tanh(z_btv / cap)


def update_balance(config: Config, params: Params, load: dict[str, jax.Array]) -> Params:
    """After a step: the experts' biases moved by the `load` of the step's Output, where an MoE
    balances with BiasBalance; everything else as it is."""
    layout = config.layout
    flat = trees.flatten(params)
    for path, load_e in load.items():
        part, i, _ = path.split("/")
        blocks = {"prefix": layout.prefix, "blocks": layout.pattern, "suffix": layout.suffix}
        balance = blocks[part][int(i)].ffn.balance
        if isinstance(balance, BiasBalance):
            flat[f"{path}/bias"] = update_bias(flat[f"{path}/bias"], load_e, balance.rate)
    return trees.unflatten(flat)


def init_cache(config: Config, batch: int, length: int, dtype: Any = jnp.float32) -> Caches:
    """Empty keys and values for `batch` rows of `length` slots, as `forward` takes them."""
    layout = config.layout
    if not all(block.attention.causal for block in layout.blocks):
        raise Refused("model.attention.causal=False cannot generate from a cache; use causal=True.")

    def empty(block: Block, *stack: int) -> dict[str, jax.Array]:
        shape = (*stack, batch, length, block.attention.kv_heads, block.attention.head_dim)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    cache = {
        "prefix": {str(i): empty(block) for i, block in enumerate(layout.prefix)},
        "blocks": {
            str(i): empty(block, layout.repeats)
            for i, block in enumerate(layout.pattern)
            if layout.repeats
        },
        "suffix": {str(i): empty(block) for i, block in enumerate(layout.suffix)},
    }
    return {name: part for name, part in cache.items() if part}
