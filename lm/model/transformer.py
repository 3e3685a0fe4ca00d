"""`Transformer`: tokens [B, T] -> hidden states [B, T, D] (Vaswani et al., arXiv:1706.03762).

Its weights, as a nested dict of arrays, are

    embed/table  prefix/0/...  blocks/0/...  suffix/0/...  final_norm/...  unembed/w  adapter/...

`blocks` has one entry per block of the repeated pattern, whose arrays have a leading axis of the
repeats; they run as one scan, so the compiled program does not grow with the number of layers.
`prefix` and `suffix` are single layers.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

import kernels_pallas
from lm import trees
from lm.errors import UserError
from lm.model import moe
from lm.model.adapters.adapter import ROOT, Weight
from lm.model.block import TransformerBlock, shard_stream
from lm.model.config import Block, Config
from lm.model.dropout import dropout
from lm.model.initializers import normal
from lm.model.layers import Caches, ForwardOptions, Inputs, LayerSums, fold, run_layers
from lm.model.param import OneKey, axes_of, dense, param
from lm.parallel.sharding import (
    context_parallel_size,
    is_sharded,
    partition,
    shard,
    shard_map,
    split_over,
    weight_partition,
)

Params = dict[str, Any]
Statistics = dict[str, Any]  # path of a feed-forward's parameters -> its sums over tokens


class Output(NamedTuple):
    """Of a forward pass.

    hidden_btd  after the final norm
    statistics  {path of an MoE's parameters: its router statistics, summed over tokens}, for
                `auxiliary`; those of the parts of a batch add up. {} for a dense model
    cache       with this call's keys and values; None without a cache
    """

    hidden_btd: jax.Array
    statistics: Statistics
    cache: Caches | None


class Embedding(nnx.Module):
    """tokens_bt -> x_btd. Weight: table [V, D]."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        shape, init = (config.vocab, config.dim), normal(config.embed_std)
        self.table = param(rngs, shape, ("vocab", "embed"), init)
        self.scale = config.embed_scale

    def __call__(self, tokens_bt: jax.Array) -> jax.Array:
        x_btd = _look_up(dense(self.table), tokens_bt)
        return x_btd if self.scale is None else x_btd * jnp.asarray(self.scale, x_btd.dtype)


def _look_up(table_vd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    """x_btd. With FSDP, each device looks up its part of the width for the tokens of all devices
    that share the table, and an all-to-all exchanges the results: tokens and activations are small
    beside the table and its gradient."""
    if not is_sharded():
        return table_vd[tokens_bt]
    width_axes = split_over(weight_partition(("vocab", "embed"), table_vd.shape)[1])
    rows = partition(tokens_bt.shape, "batch", "seq")
    if not width_axes or not set(width_axes) <= set(split_over(rows[0])):
        return shard(table_vd, "vocab", "embed")[tokens_bt]

    def local(table_vd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
        tokens_bt = jax.lax.all_gather(tokens_bt, width_axes, axis=0, tiled=True)
        return jax.lax.all_to_all(table_vd[tokens_bt], width_axes, 0, 2, tiled=True)

    # Only mesh axes of size above 1: XLA cannot mix automatic axes with manual ones of size 1.
    axes = [name for part in rows for name in split_over(part)]
    in_specs = (PartitionSpec(None, width_axes), rows)
    return shard_map(local, in_specs, rows, axes=axes)(table_vd, tokens_bt)


class Unembedding(nnx.Module):
    """The output matrix w [D, V]."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        init = config.init.build(config.layers).reads(config.dim, config.vocab)
        self.w = param(rngs, (config.dim, config.vocab), ("embed", "vocab"), init)


class ScalarHead(nnx.Module):
    """The vector w [D, 1] of a scalar head."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        # As of a linear layer in a fresh classifier: scores start near zero.
        init = normal((config.dim + 1) ** -0.5)
        self.w = param(rngs, (config.dim, 1), ("embed", "score"), init)


class Transformer(nnx.Module):
    """A decoder-only transformer.

        model = Transformer(config, rngs=nnx.Rngs(0))
        logits_btv = model.logits(model(tokens_bt).hidden_btd)

    The weights of `blocks` are stacked over the repeats of the pattern.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        layout = config.layout

        def stack(block: Block) -> TransformerBlock:
            keys = jax.random.split(rngs.params(), layout.repeats)
            make = lambda key: TransformerBlock(config, block, rngs=nnx.Rngs(params=key))  # noqa: E731
            return jax.vmap(make)(keys)

        def single(blocks: tuple[Block, ...]) -> nnx.List:
            return nnx.List([TransformerBlock(config, block, rngs=rngs) for block in blocks])

        self.config = config
        self.embed = Embedding(config, rngs=rngs)
        self.prefix = single(layout.prefix)
        self.blocks = nnx.List([stack(block) for block in layout.pattern if layout.repeats])
        self.suffix = single(layout.suffix)
        last = config.placement != "post"
        self.final_norm = config.norm.build(config.dim, rngs) if last else None
        has_vocab = config.head == "vocab"
        self.unembed = Unembedding(config, rngs=rngs) if has_vocab and not config.tied else None
        self.score = None if has_vocab else ScalarHead(config, rngs=rngs)

    def __call__(
        self,
        tokens_bt: jax.Array,
        *,
        segments_bt: jax.Array | None = None,
        positions_bt: jax.Array | None = None,
        mask_bt: jax.Array | None = None,
        cache: Caches | None = None,
        dropout_key: jax.Array | None = None,
        options: ForwardOptions = ForwardOptions(),  # noqa: B008
    ) -> Output:
        """Hidden states of the tokens, computed in the dtype of the weights.

        Args:
          segments_bt: document of each token; attention stays within documents, and 0 is padding.
            None: one document per row.
          positions_bt: position in its document, from 0; None: in its row. With a cache: position
            in the sequence of the row, continuing that of earlier calls.
          mask_bt: true on real tokens; None: where segments_bt is not 0. Padding is not stored in a
            cache and enters no expert.
          cache: from `init_cache`, or from the Output of an earlier call.
          dropout_key: a jax.random.key; None turns dropout off.
        """
        if cache is not None and segments_bt is not None:
            raise ValueError("a cache holds one document per row: give segments_bt or cache")
        config = self.config
        if positions_bt is None:
            rows = 1 if cache is None else tokens_bt.shape[0]
            shape = (rows, tokens_bt.shape[1])
            positions_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), shape)
        inputs = Inputs(segments_bt, positions_bt, mask_bt)
        tokens_bt, inputs = _split_context(tokens_bt, inputs)
        positions = inputs.prepare(config, cached=cache is not None)

        x_btd = dropout(self.embed(tokens_bt), config.dropout, fold(dropout_key, 0))
        parts = {name: tuple(getattr(self, name)) for name in ("prefix", "blocks", "suffix")}
        x_btd, caches, sums = run_layers(
            config, parts, shard_stream(x_btd), inputs, positions, cache, dropout_key, options
        )
        if self.final_norm is not None:
            x_btd = shard_stream(self.final_norm(x_btd))
        return Output(
            hidden_btd=_join_context(shard(x_btd, "batch", "seq", "embed")),
            statistics=_by_path(sums),
            cache=None if cache is None else caches,
        )

    def values(self, hidden_btd: jax.Array) -> jax.Array:
        """Values [B, T] in float32 of hidden states. Raises UserError for a model without a scalar
        head."""
        if self.score is None:
            raise UserError("model.head='vocab' gives logits; a reward model has head='scalar'.")
        w_d1 = dense(self.score.w)
        values = jnp.einsum("btd,de->bte", hidden_btd, w_d1, preferred_element_type=jnp.float32)
        return shard(values[..., 0], "batch", "seq")

    def unembedding(self) -> jax.Array:
        """The output matrix w_dv, which is the embedding transposed if they are tied. Raises
        UserError for a model with a scalar head."""
        if self.score is not None:
            raise UserError("model.head='scalar' gives values (a reward model), not logits.")
        if self.config.tied:
            return dense(self.embed.table).T
        return dense(self.unembed.w)

    def logits(self, hidden_btd: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32 of hidden states, soft-capped by `config.logit_softcap`."""
        w_dv = self.unembedding()
        alone = hidden_btd.shape[:2] == (1, 1)
        if alone:  # XLA on CPUs would add in another order than for several tokens
            hidden_btd = jnp.pad(hidden_btd, ((0, 0), (0, 1), (0, 0)))
        z_btv = jnp.einsum("btd,dv->btv", hidden_btd, w_dv, preferred_element_type=jnp.float32)
        z_btv = z_btv[:, :1] if alone else z_btv
        z_btv = shard(z_btv, "batch", "seq", "vocab")
        cap = self.config.logit_softcap
        return z_btv if cap is None else cap * jnp.tanh(z_btv / cap)


def _split_context(tokens_bt: jax.Array, inputs: Inputs) -> tuple[jax.Array, Inputs]:
    """With context parallelism, reorders each row so that every device has the same share of the
    work of causal attention."""
    parts = context_parallel_size()
    if parts == 1:
        return tokens_bt, inputs
    order = kernels_pallas.placement(tokens_bt.shape[1], parts)
    tokens_bt, *rest = (None if x is None else x[:, order] for x in (tokens_bt, *inputs))
    return tokens_bt, Inputs(*rest)


def _join_context(x_btd: jax.Array) -> jax.Array:
    """Undoes `_split_context`."""
    if context_parallel_size() == 1:
        return x_btd
    rows = PartitionSpec(None, "context")
    in_order = partial(kernels_pallas.in_order, axis_name="context")
    return shard_map(in_order, (rows,), rows, axes=("context",))(x_btd)


def _by_path(sums: dict[str, LayerSums]) -> Statistics:
    return {
        f"{name}/{i}/ffn": measured
        for name, part in sums.items()
        for i, measured in part.items()
        if measured is not None
    }


def auxiliary(
    config: Config, statistics: Statistics
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The auxiliary losses and the load of a batch, from its `Output.statistics`.

    Returns:
      The losses by name, weighted and summed over layers, each a mean over tokens; and the load of
      each MoE, {path: share of the assignments that each expert got, [E] or [repeats, E]}.
    """
    losses: dict[str, jax.Array] = {}
    loads = {}
    for path, sums in statistics.items():
        own, load = _block(config, path).ffn.measures(sums)
        if load is not None:
            loads[path] = load
        losses |= {name: losses.get(name, 0.0) + x.sum() for name, x in own.items()}
    return losses, loads


def _block(config: Config, path: str) -> Block:
    """The block of a feed-forward's path, 'blocks/0/ffn'."""
    part, i, _ = path.split("/")
    return config.layout.parts[part][int(i)]


class Declaration(NamedTuple):
    """Of a model: the structure of its module, the weights that the modules read, and those that
    are stored, by path (see lm.model.adapters)."""

    graph: Any
    modules: dict[str, Weight]
    stored: dict[str, Weight]


@functools.lru_cache(maxsize=64)
def _declaration(config: Config) -> Declaration:
    """Allocates nothing."""
    make = lambda key: Transformer(config, rngs=OneKey(key))  # noqa: E731
    graph, state = nnx.split(jax.eval_shape(make, jax.random.key(0)))

    def weight(path: str, x: nnx.Param) -> Weight:
        stacked = ("layers",) if path.startswith("blocks/") else ()
        return Weight(x.get_value(), stacked + axes_of(x), x.get_metadata()["init"])

    modules = {path: weight(path, x) for path, x in trees.flatten(state).items()}
    stored = config.adapter.declare(modules) if config.adapter else modules
    return Declaration(graph, modules, _quantized(config, stored))


def _quantized(config: Config, weights: dict[str, Weight]) -> dict[str, Weight]:
    """The weights with the quantized ones as `trees.Leaf`."""
    if config.quant is None:
        return weights
    return {
        path: w._replace(shape=jax.eval_shape(partial(config.quant.quantize, axes=w.axes), w.shape))
        if config.quant.applies(path, w.axes)
        else w
        for path, w in weights.items()
    }


def module(config: Config, params: Params) -> Transformer:
    """The Flax module with these weights, a nested dict as `init` returns it."""

    def keyed(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {int(k) if k.isdigit() else k: keyed(v) for k, v in tree.items()}

    declared = _declaration(config)
    if config.adapter is not None:
        params = trees.unflatten(config.adapter.bind(trees.flatten(params), declared.modules))
    return nnx.merge(declared.graph, keyed(params))


def init(config: Config, key: jax.Array, paths: Collection[str] | None = None) -> Params:
    """Fresh float32 weights; quantized where the config says so. Call it as
    `jax.jit(init, static_argnums=(0, 2), out_shardings=...)` to create them sharded; the values do
    not depend on the mesh.

    `paths` draws only these weights, with the same values.
    """
    declared = _declaration(config)
    ours, plain = (
        {path: w for path, w in declared.stored.items() if path.startswith(f"{ROOT}/") == is_ours}
        for is_ours in (True, False)
    )
    # The weights of the model itself have the same values with and without an adapter.
    keys = [*jax.random.split(key, len(plain))]
    keys += [jax.random.fold_in(keys[0], i) for i in range(1, 1 + len(ours))]
    drawn = {}
    for draw, (path, w) in zip(keys, [*plain.items(), *ours.items()], strict=True):
        if paths is None or path in paths:
            x = w.init(draw, w.shape.shape, w.shape.dtype)
            drawn[path] = config.quant.quantize(x, w.axes) if trees.is_leaf(w.shape) else x
    return trees.unflatten(drawn)


def complete(config: Config, params: Params, key: jax.Array) -> Params:
    """All weights of a model: those of `params`, quantized where the config says so and dense where
    it does not, and fresh ones where `params` has none."""
    declared, flat = _declaration(config).stored, trees.flatten(params)
    missing = [path for path in declared if path not in flat]
    fresh = trees.flatten(init(config, key, missing)) if missing else {}

    def converted(path: str, x: Any) -> Any:
        if trees.is_leaf(declared[path].shape) == trees.is_leaf(x):
            return x
        return x.dense() if trees.is_leaf(x) else config.quant.quantize(x, declared[path].axes)

    return trees.unflatten(
        {path: fresh[path] if path in fresh else converted(path, flat[path]) for path in declared}
    )


def merge(config: Config, params: Params) -> Params:
    """The weights of the model without adapter and quantization that computes the same. Raises
    UserError for an adapter that cannot be merged."""
    bound = trees.flatten(params)
    if config.adapter is not None:
        config.adapter.check_merges("the model")
        bound = config.adapter.bind(bound, _declaration(config).modules)

    def merged(x: Any) -> jax.Array:
        if not trees.is_leaf(x):
            return x
        # The first array of a leaf has the axes of the weight.
        where = getattr(jax.tree.leaves(x)[0], "sharding", None)
        return jax.jit(lambda leaf: leaf.dense(), out_shardings=where)(x)

    return trees.unflatten({path: merged(x) for path, x in bound.items()})


def adapter_weights(config: Config, params: Params) -> dict[str, jax.Array]:
    """The weights of the model's adapter by path, those of an encoder replaced by what it
    computes."""
    flat = trees.flatten(params)
    if not config.adapter.is_computed:
        return {path: x for path, x in flat.items() if path.startswith(f"{ROOT}/")}
    declared = _declaration(config).modules
    bound = config.adapter.bind(flat, declared)
    return {f"{ROOT}/{path}": x for path, x in bound.items() if path not in flat}


def shapes(config: Config) -> Params:
    """A jax.ShapeDtypeStruct for every weight; of a quantized one, a `trees.Leaf` of them."""
    return trees.unflatten({path: w.shape for path, w in _declaration(config).stored.items()})


def axes(config: Config) -> Params:
    """A tuple of logical axis names for every weight (see lm.parallel.sharding)."""
    return trees.unflatten({path: w.axes for path, w in _declaration(config).stored.items()})


def update_balance(config: Config, params: Params, load: dict[str, jax.Array]) -> Params:
    """Moves the routing biases of experts by the `load` of a step's batch (see `auxiliary`), for an
    MoE that balances with BiasBalance; leaves all other weights as they are."""
    flat = trees.flatten(params)
    for path, load_e in load.items():
        balance = getattr(_block(config, path).ffn, "balance", None)
        if isinstance(balance, moe.BiasBalance) and f"{path}/bias" in flat:
            flat[f"{path}/bias"] = moe.update_bias(flat[f"{path}/bias"], load_e, balance.rate)
    return trees.unflatten(flat)


def init_cache(config: Config, batch: int, length: int, dtype: Any = jnp.float32) -> Caches:
    """Empty caches of all layers, for `batch` rows of at most `length` tokens. A sliding-window
    layer takes memory for its window only."""
    return _caches(
        config, lambda attention, *stack: attention.init_cache(batch, length, dtype, *stack)
    )


def init_pages(
    config: Config, pages: Mapping[Any, int], slots: int, dtype: Any = jnp.float32, ways: int = 1
) -> Caches:
    """Empty paged caches of all layers (see lm.model.paged): `pages[reach]` pages of `slots` tokens
    in layers of this reach, whose heads divide by `ways` devices."""
    return _caches(
        config, lambda attention, *stack: attention.init_pages(pages, slots, dtype, ways, *stack)
    )


def reaches(config: Config) -> list[tuple[int, int] | None]:
    """The different (window, sink tokens) that tokens see in the layers; None: all positions."""
    return list(dict.fromkeys(block.attention.reach() for block in config.layout.blocks))


def _caches(config: Config, empty: Callable[..., Any]) -> Caches:
    """empty(attention, *stack) for all layers."""
    caches = {}
    for name, blocks in config.layout.parts.items():
        repeats = config.layout.repeats
        stack = (repeats,) if name == "blocks" else ()
        caches[name] = {
            str(i): empty(block.attention, *stack)
            for i, block in enumerate(blocks)
            if name != "blocks" or repeats
        }
    return {name: part for name, part in caches.items() if part}
