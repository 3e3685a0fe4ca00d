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
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

import kernels_pallas
from lm import trees
from lm.errors import UserError
from lm.model import moe
from lm.model.attention import Cache, Positions
from lm.model.config import Block, Config
from lm.model.moe import BiasBalance, update_bias
from lm.model.param import normal, param
from lm.model.rope import RoPE
from lm.parallel.mesh import check_remat
from lm.parallel.pipeline import Schedule, pipeline
from lm.parallel.sharding import (
    context_parallel_size,
    is_sharded,
    partition,
    shard,
    shard_map,
    split_over,
    stages,
    weight_partition,
)

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
    ) -> tuple[jax.Array, Cache | None, moe.Sums | None]:
        keys = (None, None) if key is None else jax.random.split(key)
        h_btd = self._read(x_btd, self.attention_norm)
        h_btd, cache = self.attention(h_btd, positions, cache)
        x_btd = self._add(x_btd, h_btd, self.attention_out_norm, keys[0])
        h_btd = self._read(x_btd, self.ffn_norm)
        h_btd, sums = self.ffn(h_btd, positions.mask_bt)
        x_btd = self._add(x_btd, h_btd, self.ffn_out_norm, keys[1])
        return _stream(x_btd), cache, sums

    def _read(self, x_btd: jax.Array, norm: Callable | None) -> jax.Array:
        """What attention or feed-forward sees of the stream."""
        h_btd = x_btd if norm is None else _stream(norm(x_btd))
        return shard(h_btd, "batch", "seq", "embed")

    def _add(
        self, x_btd: jax.Array, h_btd: jax.Array, norm: Callable | None, key: jax.Array | None
    ) -> jax.Array:
        h_btd = _stream(h_btd)
        if self.placement == "post":
            return norm(x_btd + _dropout(h_btd, self.dropout, key))
        if norm is not None:
            h_btd = norm(h_btd)
        return x_btd + _dropout(h_btd, self.dropout, key)


def _stream(x_btd: jax.Array) -> jax.Array:
    return shard(x_btd, "batch", "stream", "embed")


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
    if not is_sharded():
        return table_vd[tokens_bt]
    kept = split_over(weight_partition(("vocab", "embed"), table_vd.shape)[1])
    rows = partition(tokens_bt.shape, "batch", "seq")
    if not kept or not set(kept) <= set(split_over(rows[0])):
        return shard(table_vd, "vocab", "embed")[tokens_bt]

    def local(table_vd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
        tokens_bt = jax.lax.all_gather(tokens_bt, kept, axis=0, tiled=True)
        return jax.lax.all_to_all(table_vd[tokens_bt], kept, 0, 2, tiled=True)

    # Only the axes of several devices: XLA refuses to mix automatic axes with manual ones of one.
    axes = [name for part in rows for name in split_over(part)]
    return shard_map(local, (PartitionSpec(None, kept), rows), rows, axes=axes)(table_vd, tokens_bt)


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
    """A tuple of logical axis names for every weight (see lm.parallel.sharding)."""
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
    remat: str | tuple[str, ...] = "none",
    microbatches: int | None = None,
    circular_repeats: int = 1,
    accumulate: str = "float32",
    offload: bool = False,
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
      remat: what the backward pass computes anew, as lm.parallel.mesh.Place has it.
      microbatches, circular_repeats, accumulate: of the pipeline, where the mesh has one (see lm.parallel.pipeline);
        None: as many micro-batches as there are stages.
      offload: keeps the inputs of layers in the host's memory until the backward pass.
    """
    check_remat("remat", remat)
    if cache is not None and segments_bt is not None:
        raise ValueError("a cache holds one document per row: give either segments_bt or cache")
    model = _module(config, jax.tree.map(jnp.asarray, params))
    if positions_bt is None:
        rows = 1 if cache is None else tokens_bt.shape[0]
        positions_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), (rows, tokens_bt.shape[1]))

    parts = context_parallel_size()
    if parts > 1:
        # Placed so that causal attention is as much work for each device.
        order = kernels_pallas.placement(tokens_bt.shape[1], parts)
        tokens_bt, segments_bt, positions_bt = (
            None if x is None else x[:, order] for x in (tokens_bt, segments_bt, positions_bt)
        )
    documents = Documents(segments_bt, positions_bt)
    positions = _positions(config, documents, cached=cache is not None)

    def apply(layer, x_btd, layer_cache, number, in_scan):
        def of_layer(layer, x_btd, *rest):
            x_btd = checkpoint_name(x_btd, _LAYER) if offload else x_btd
            return layer(x_btd, positions, *rest)

        policy = _offloading(_policy(remat)) if offload else _policy(remat)
        # A scan already keeps the two passes apart; elsewhere XLA would merge them and undo the
        # saving.
        run = jax.checkpoint(of_layer, policy=policy, prevent_cse=not in_scan)
        return run(layer, x_btd, layer_cache, _fold(dropout_key, 1 + number))

    x_btd = _dropout(model.embed(tokens_bt), config.dropout, _fold(dropout_key, 0))
    x_btd = _stream(x_btd)
    sums, caches, number = {}, {}, 0
    for name, run in (("prefix", _one_by_one), ("blocks", _scan), ("suffix", _one_by_one)):
        if layers := tuple(getattr(model, name)):
            given = {} if cache is None else cache[name]
            if name == "blocks" and cache is None and stages() > 1:
                schedule = Schedule(
                    layers=config.layout.repeats,
                    stages=stages(),
                    circular_repeats=circular_repeats,
                    microbatches=microbatches or stages(),
                )
                options = {"accumulate": accumulate, "policy": _policy_of_stages(remat)}
                x_btd, sums[name] = _in_stages(
                    config, layers, x_btd, documents, dropout_key, number, schedule, **options
                )
            else:
                x_btd, new, sums[name] = run(apply, layers, x_btd, given, number)
                if cache is not None:
                    caches[name] = new
            number += len(layers) * (config.layout.repeats if name == "blocks" else 1)
    losses, load = _measures(config, sums)
    if model.final_norm is not None:
        x_btd = _stream(model.final_norm(x_btd))
    x_btd = shard(x_btd, "batch", "seq", "embed")
    if parts > 1:
        rows = PartitionSpec(None, "context")
        in_order = partial(kernels_pallas.in_order, axis_name="context")
        x_btd = shard_map(in_order, (rows,), rows, axes=("context",))(x_btd)
    return Output(
        hidden_btd=x_btd,
        losses=losses,
        load=load,
        cache=caches or None,
    )


class Documents(NamedTuple):
    """Of each token: which document of its row, and which place in it; [1, T] where all rows have
    the same places."""

    segments_bt: jax.Array | None
    positions_bt: jax.Array


def _positions(config: Config, documents: Documents, cached: bool) -> Positions:
    segments_bt, positions_bt = documents
    return Positions(
        segments_bt=segments_bt,
        slots_bt=positions_bt if cached else None,
        mask_bt=None if segments_bt is None else segments_bt != 0,
        tables=_rope_tables(config, positions_bt),
    )


Caches = dict[str, Any]
Sums = dict[str, moe.Sums | None]


def _one_by_one(
    apply: Callable,
    layers: tuple[Layer, ...],
    x_btd: jax.Array,
    caches: Caches,
    first: int | jax.Array,
    repeat: jax.Array | None = None,
) -> tuple[jax.Array, Caches, Sums]:
    """Layers one after another, numbered from `first`; inside a scan `repeat` tells their place in
    stacked caches."""
    sums = {}
    for i, layer in enumerate(layers):
        cache = Cache(**caches[str(i)], layer=repeat) if caches else None
        x_btd, cache, sums[str(i)] = apply(layer, x_btd, cache, first + i, repeat is not None)
        if cache is not None:
            caches = caches | {str(i): {"k": cache.k, "v": cache.v}}
    return x_btd, caches, sums


def _scan(
    apply: Callable, layers: tuple[Layer, ...], x_btd: jax.Array, caches: Caches, first: int
) -> tuple[jax.Array, Caches, Sums]:
    """The repeated pattern, with stacked weights. Caches are carried, so that each step writes its
    keys in place."""

    def repeat(carry, xs):
        i, group = xs
        *carry, sums = _one_by_one(apply, group, *carry, first + i * len(group), i)
        return tuple(carry), sums

    repeats = jax.tree.leaves(layers)[0].shape[0]
    carry, sums = jax.lax.scan(repeat, (x_btd, caches), (jnp.arange(repeats), layers))
    return *carry, sums


def _in_stages(
    config: Config,
    layers: tuple[Layer, ...],
    x_btd: jax.Array,
    documents: Documents,
    dropout_key: jax.Array | None,
    first: int,
    schedule: Schedule,
    **options: Any,
) -> tuple[jax.Array, Sums]:
    """The repeated pattern, in stages on several devices."""
    rows = x_btd.shape[0]
    same = Documents(*(a if a is not None and a.shape[0] < rows else None for a in documents))
    along = Documents(*(a if b is None else None for a, b in zip(documents, same, strict=True)))

    def begin(along, microbatch):
        documents = Documents(*(b if a is None else a for a, b in zip(along, same, strict=True)))
        positions = _positions(config, documents, cached=False)
        key = _fold(dropout_key, -1 - microbatch)

        def apply(layer, x_btd, cache, number, in_scan):
            x_btd = checkpoint_name(x_btd, _LAYER)
            return layer(x_btd, positions, cache, _fold(key, 1 + number))

        def layer(group, x_btd, repeat):
            x_btd, _, sums = _one_by_one(
                apply, group, x_btd, {}, first + repeat * len(group), repeat
            )
            return x_btd, sums

        return layer

    partitions = [
        weight_partition(("layers", *weight.get_metadata()["axes"]), weight.shape)
        for weight in jax.tree.leaves(layers, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    ]
    return pipeline(begin, layers, x_btd, along, schedule, partitions=partitions, **options)


def _measures(config: Config, sums: dict[str, Sums]) -> tuple[Losses, dict[str, jax.Array]]:
    """The side losses, summed over layers, and the load of each MoE."""
    layout = config.layout
    blocks = {"prefix": layout.prefix, "blocks": layout.pattern, "suffix": layout.suffix}
    total: Losses = {}
    loads = {}
    for name, part in sums.items():
        for i, measured in part.items():
            if measured is not None:
                losses, load = moe.measures(blocks[name][int(i)].ffn, measured)
                loads[f"{name}/{i}/ffn"] = load
                total |= {name: total.get(name, 0.0) + x.sum() for name, x in losses.items()}
    return total, loads


# What costs less to compute anew than to write and read back.
_ELEMENTWISE = {
    "add", "sub", "mul", "div", "neg", "max", "min", "square", "integer_pow", "sqrt", "rsqrt",
    "exp", "log", "tanh", "erf", "logistic", "cos", "sin", "select_n", "convert_element_type",
    "broadcast_in_dim", "reshape", "transpose", "squeeze", "concatenate", "slice", "split",
    "reduce_sum", "sharding_constraint", "dynamic_slice",
}  # fmt: skip


_LAYER = "layer"  # the name of what enters a layer, for policies of stages and for offloading


def _policy(remat: str | tuple[str, ...]) -> Callable[..., bool] | None:
    """Of jax.checkpoint around a layer, whose inputs are kept whatever it says."""
    policies = jax.checkpoint_policies
    if remat in ("none", "stage"):
        return lambda primitive, *_, **__: primitive.name not in _ELEMENTWISE
    if remat == "block":
        return None
    if remat == "dots":
        named = policies.save_only_these_names("attention")
        return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, named)
    return policies.save_only_these_names(*([remat] if remat == "attention" else remat))


def _policy_of_stages(remat: str | tuple[str, ...]) -> Callable[..., bool] | None:
    """Of jax.checkpoint around a stage's layers: the same, but 'stage' keeps nothing."""
    if remat == "stage":
        return None
    inputs = jax.checkpoint_policies.save_only_these_names(_LAYER)
    policy = _policy(remat)
    if policy is None:
        return inputs
    return jax.checkpoint_policies.save_from_both_policies(inputs, policy)


def _offloading(policy: Callable[..., Any] | None) -> Callable[..., Any]:
    """The same, with the inputs of layers in the host's memory."""
    inputs = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_LAYER],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def both(primitive: Any, *args: Any, **params: Any) -> Any:
        if params.get("name") == _LAYER or policy is None:
            return inputs(primitive, *args, **params)
        return policy(primitive, *args, **params)

    return both


def _fold(key: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, number)


def _rope_tables(config: Config, positions_bt: jax.Array) -> dict[Any, Any]:
    used = {(block.attention.position, block.attention.head_dim) for block in config.layout.blocks}
    return {
        (position, head_dim): position.table(positions_bt, head_dim)
        for position, head_dim in used
        if isinstance(position, RoPE)
    }


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
        raise UserError(
            "model.attention.causal=False cannot generate from a cache; use causal=True."
        )

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
