"""Runs the layers of a model: one after another, in a scan, or as a pipeline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lm import trees
from lm.model.attention import Positions
from lm.model.block import TransformerBlock
from lm.model.cache import Cache
from lm.model.config import Config
from lm.model.moe import Sums
from lm.model.param import axes_of
from lm.model.remat import LAYER_INPUT, layer_policy, offload_inputs, stage_policy
from lm.parallel.mesh import Place, check_remat
from lm.parallel.pipeline import Schedule, pipeline
from lm.parallel.sharding import pipeline_parallel_size, weight_partition

Caches = dict[str, Any]  # part -> index of the block -> Cache
LayerSums = dict[str, Sums | None]  # index of the block -> router statistics


@dataclass(frozen=True, kw_only=True)
class ForwardOptions:
    """How a forward pass spends memory and devices; the numbers do not depend on it.

    Args:
      remat, offload: activation checkpointing and offload of layer inputs (see `Place`).
      microbatches, circular_repeats, accumulate: of a pipeline (see lm.parallel.pipeline);
        microbatches=None takes as many as there are stages.
    """

    remat: str | tuple[str, ...] = "none"
    offload: bool = False
    microbatches: int | None = None
    circular_repeats: int = 1
    accumulate: str = "float32"

    def __post_init__(self) -> None:
        check_remat("remat", self.remat)

    @classmethod
    def of(cls, place: Place) -> "ForwardOptions":
        """The options of a place."""
        return cls(
            remat=place.remat,
            offload="layers" in place.offload,
            microbatches=place.microbatches,
            circular_repeats=place.circular_repeats,
            accumulate=place.accumulate,
        )


class Inputs(NamedTuple):
    """Of each token: its document in the row, its position, and whether it is real (None: where the
    document is not 0). [1, T] where all rows are alike."""

    segments_bt: jax.Array | None
    positions_bt: jax.Array
    mask_bt: jax.Array | None = None

    def prepare(self, config: Config, cached: bool) -> Positions:
        """With the RoPE tables of all layers."""
        segments_bt, positions_bt, mask_bt = self
        if mask_bt is None and segments_bt is not None:
            mask_bt = segments_bt != 0
        used = {block.attention.rope() for block in config.layout.blocks} - {None}
        return Positions(
            segments_bt=segments_bt,
            positions_bt=positions_bt if cached else None,
            mask_bt=mask_bt,
            tables={
                (rope, head_dim): rope.table(positions_bt, head_dim) for rope, head_dim in used
            },
        )


def run_layers(
    config: Config,
    parts: dict[str, tuple[TransformerBlock, ...]],
    x_btd: jax.Array,
    inputs: Inputs,
    positions: Positions,
    cache: Caches | None,
    dropout_key: jax.Array | None,
    options: ForwardOptions,
) -> tuple[jax.Array, Caches, dict[str, LayerSums]]:
    """All layers of a model; `positions` are the prepared `inputs`.

    `parts` are the layers of "prefix", "blocks" (stacked over the repeats of the pattern) and
    "suffix". Returns x_btd, the caches and the router statistics, by part.
    """
    apply = _checkpointed(positions, dropout_key, options)
    caches, sums, number = {}, {}, 0
    for name, layers in parts.items():
        if not layers:
            continue
        if name != "blocks":
            part = _one_by_one(apply, layers, x_btd, cache and cache[name], number)
        elif cache is None and pipeline_parallel_size() > 1:
            part = _pipelined(config, layers, x_btd, inputs, dropout_key, number, options)
        else:
            repeats = config.layout.repeats
            part = _scanned(apply, layers, x_btd, cache and cache[name], number, repeats)
        x_btd, caches[name], sums[name] = part
        number += len(layers) * (config.layout.repeats if name == "blocks" else 1)
    return x_btd, caches, sums


# apply(layer, x_btd, cache, number, in_scan) -> (x_btd, cache, sums)
Apply = Callable[..., tuple[jax.Array, Cache | None, Sums | None]]


def _checkpointed(
    positions: Positions, dropout_key: jax.Array | None, options: ForwardOptions
) -> Apply:
    """Applies a layer with activation checkpointing."""
    policy = layer_policy(options.remat)
    policy = offload_inputs(policy) if options.offload else policy

    def of_layer(layer, x_btd, *rest):
        x_btd = checkpoint_name(x_btd, LAYER_INPUT) if options.offload else x_btd
        return layer(x_btd, positions, *rest)

    def apply(layer, x_btd, cache, number, in_scan):
        # In a scan the forward and the backward pass are separate loops; elsewhere XLA would merge
        # the recomputation with the forward pass.
        run = jax.checkpoint(of_layer, policy=policy, prevent_cse=not in_scan)
        return run(layer, x_btd, cache, fold(dropout_key, 1 + number))

    return apply


def _one_by_one(
    apply: Apply,
    layers: tuple[TransformerBlock, ...],
    x_btd: jax.Array,
    caches: Caches | None,
    first: int | jax.Array,
    repeat: jax.Array | None = None,
) -> tuple[jax.Array, Caches, LayerSums]:
    """Layers one after another, numbered from `first`. In a scan, `repeat` is their index in the
    stacked caches."""
    sums, caches = {}, dict(caches or {})
    for i, layer in enumerate(layers):
        cache = caches[str(i)].at(repeat) if caches else None
        x_btd, cache, sums[str(i)] = apply(layer, x_btd, cache, first + i, repeat is not None)
        if cache is not None:
            caches[str(i)] = cache.at(None)
    return x_btd, caches, sums


def _scanned(
    apply: Apply,
    layers: tuple[TransformerBlock, ...],
    x_btd: jax.Array,
    caches: Caches | None,
    first: int,
    repeats: int,
) -> tuple[jax.Array, Caches, LayerSums]:
    """A scan over the repeats of the pattern, with stacked weights. Caches are carried, so that
    each iteration writes its keys in place."""

    def repeat(carry, xs):
        i, group = xs
        *carry, sums = _one_by_one(apply, group, *carry, first + i * len(group), i)
        return tuple(carry), sums

    carry, sums = jax.lax.scan(repeat, (x_btd, caches or {}), (jax.numpy.arange(repeats), layers))
    return *carry, sums


def _pipelined(
    config: Config,
    layers: tuple[TransformerBlock, ...],
    x_btd: jax.Array,
    inputs: Inputs,
    dropout_key: jax.Array | None,
    first: int,
    options: ForwardOptions,
) -> tuple[jax.Array, Caches, LayerSums]:
    """The repeats of the pattern in pipeline stages."""
    rows = x_btd.shape[0]
    # Arrays of [1, T] are the same for all micro-batches; the others travel with them.
    shared = Inputs(*(a if a is not None and a.shape[0] < rows else None for a in inputs))
    along = Inputs(*(a if b is None else None for a, b in zip(inputs, shared, strict=True)))

    def begin(along, microbatch):
        own = Inputs(*(b if a is None else a for a, b in zip(along, shared, strict=True)))
        positions = own.prepare(config, cached=False)
        key = fold(dropout_key, -1 - microbatch)

        def apply(layer, x_btd, cache, number, in_scan):
            x_btd = checkpoint_name(x_btd, LAYER_INPUT)
            return layer(x_btd, positions, cache, fold(key, 1 + number))

        def layer(group, x_btd, repeat):
            number = first + repeat * len(group)
            x_btd, _, sums = _one_by_one(apply, group, x_btd, None, number, repeat)
            return x_btd, sums

        return layer

    stages = pipeline_parallel_size()
    x_btd, sums = pipeline(
        begin,
        layers,
        x_btd,
        along,
        Schedule(
            layers=config.layout.repeats,
            stages=stages,
            circular_repeats=options.circular_repeats,
            microbatches=options.microbatches or stages,
        ),
        partitions=_partitions(layers),
        accumulate=options.accumulate,
        policy=stage_policy(options.remat),
    )
    return x_btd, {}, sums


def _partitions(layers: tuple[TransformerBlock, ...]) -> list[PartitionSpec]:
    """PartitionSpec of each array of stacked layers."""

    def of_array(names: Sequence[str], x: jax.Array) -> PartitionSpec:
        return weight_partition(("layers", *names), x.shape)

    partitions = []
    for weight in jax.tree.leaves(layers, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)):
        leaf, names = weight.get_value(), axes_of(weight)
        if isinstance(leaf, trees.Leaf):
            partitions += jax.tree.leaves(leaf.of_arrays(of_array, names))
        else:
            partitions.append(of_array(names, leaf))
    return partitions


def fold(key: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """jax.random.fold_in, or None without a key."""
    return None if key is None else jax.random.fold_in(key, number)
