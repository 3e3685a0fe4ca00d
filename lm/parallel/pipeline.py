"""Pipeline parallelism: the mesh axis `pipe` splits stacked layers into stages, and micro-batches
pass from stage to stage (GPipe, arXiv:1811.06965; circular, or interleaved, schedule,
arXiv:2104.04473).

A stage holds `circular_repeats` groups of consecutive layers. Group g is on stage g modulo the
number of stages, so that a micro-batch passes through the ring of stages `circular_repeats` times.
Micro-batches enter in turns of as many as there are stages: when the last of a turn has entered,
the first one returns to stage 0, to begin its next pass or to leave. Stages are idle only while the
pipeline fills and drains, and no micro-batch has to be buffered between two passes. Two stages, two
circular repeats and the micro-batches a, b, c, d take 9 iterations, in 8 of which each stage
computes:

    stage 0   a1 b1 a2 b2 c1 d1 c2 d2  .
    stage 1    . a1 b1 a2 b2 c1 d1 c2 d2

where a2 is the second pass of a.

Before and after the stages `pipe` shards the batch, so that embedding and head cost each stage an
equal share. The micro-batches that wait stay sharded over the stages: in each iteration one slot of
them moves one stage towards stage 0, which takes the next micro-batch from it and puts a finished
one into its place.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.errors import UserError
from lm.parallel import sharding

Layer = Callable[[Any, Any, jax.Array], tuple[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Pipeline schedule.

    layers            repeats of the model's pattern of layers
    stages            size of the mesh axis `pipe`
    circular_repeats  groups of layers per stage; 1 is GPipe
    microbatches      parts of the batch, a multiple of `stages`
    """

    layers: int
    stages: int
    circular_repeats: int
    microbatches: int

    def __post_init__(self) -> None:
        if self.microbatches % self.stages:
            raise UserError(
                f"microbatches={self.microbatches} must be a multiple of mesh.pipe={self.stages}, "
                "the number of pipeline stages."
            )
        if self.layers < self.stages * self.circular_repeats:
            raise UserError(
                f"mesh.pipe={self.stages} times place.circular_repeats={self.circular_repeats} is "
                f"more than the {self.layers} repeats of the model's pattern; reduce one of them."
            )

    @property
    def depth(self) -> int:
        """Layers per group. If they do not divide evenly, the last groups have fewer layers and
        wait for the others."""
        return -(-self.layers // (self.stages * self.circular_repeats))

    @property
    def iterations(self) -> int:
        """Iterations of the compiled loop; in each, every stage computes one group."""
        return self.microbatches * self.circular_repeats + self.stages - 1

    @property
    def bubble(self) -> float:
        """Fraction of the stages' time that is idle: while the pipeline fills and drains, and in
        groups with fewer layers than `depth`."""
        work = self.microbatches * self.layers
        return 1 - work / (self.stages * self.iterations * self.depth)


def pipeline(
    begin: Callable[[Any, jax.Array], Layer],
    stacked: Any,
    x: Any,
    along: Any,
    schedule: Schedule,
    *,
    partitions: Sequence[PartitionSpec],
    accumulate: str = "float32",
    policy: Callable[..., bool] | None = None,
) -> tuple[Any, Any]:
    """Applies all layers of a stack, in order, on the active mesh.

    Args:
        begin: begin(along, microbatch) returns the function of one layer for a micro-batch and its
            index: layer(weights, x, layer_index) -> (x, sums).
        stacked: weights, each with a leading axis of the layers.
        x: tree of [B, ...], the input of the first layer.
        along: tree of [B, ...] that layers read and do not change; not differentiated.
        partitions: PartitionSpecs of the leaves of `stacked`. If `pipe` shards their layers and a
            stage has one group, each stage already holds its weights. Otherwise they are moved to
            their stage, by an all-to-all if `pipe` shards another axis.
        accumulate: dtype in which gradients of the weights are summed over micro-batches.
        policy: of jax.checkpoint around a group, whose input is always saved. It must not save the
            weights of a group.

    Returns:
        x after the last layer, and the sums over micro-batches, stacked by layer.
    """
    leaves, structure = jax.tree.flatten(stacked)
    leaves = [_by_stage(w, p, schedule) for w, p in zip(leaves, partitions, strict=True)]
    on_stage = partial(
        _on_stage,
        begin=begin,
        structure=structure,
        schedule=schedule,
        partitions=partitions,
        accumulate=accumulate,
        policy=policy,
        # `data` is a manual axis too, so that gradients of the weights are summed over it once,
        # after the loop.
        shards=sharding.active_mesh().shape["data"],
    )
    rows, by_device = PartitionSpec(("pipe", "data")), PartitionSpec(None, "pipe", "data")
    x, sums = jax.shard_map(
        on_stage,
        mesh=sharding.active_mesh(),
        in_specs=([_on_pipe(p) for p in partitions], rows, rows),
        out_specs=(rows, by_device),
        axis_names={"pipe", "data"},
        # Layers create arrays for loops of their own, which are not marked as varying by device.
        check_vma=False,
    )(leaves, x, along)

    def by_layer(total: jax.Array) -> jax.Array:
        return total.sum(2).reshape(-1, *total.shape[4:])[: schedule.layers]

    return x, jax.tree.map(by_layer, sums)


def _on_stage(
    leaves: list[jax.Array],
    x: Any,
    along: Any,
    *,
    begin: Callable[[Any, jax.Array], Layer],
    structure: Any,
    schedule: Schedule,
    partitions: Sequence[PartitionSpec],
    accumulate: str,
    policy: Callable[..., bool] | None,
    shards: int,
) -> tuple[Any, Any]:
    """The loop of one stage, inside shard_map over `pipe` and `data`. `shards` is the size of
    `data`; the other arguments are as in `pipeline`, with `stacked` as `leaves` and `structure`."""
    stage = jax.lax.axis_index("pipe")
    slots = schedule.microbatches // schedule.stages
    waiting = jax.tree.map(lambda a: _split(a, slots), (x, along))
    weights = [
        _with_accumulator(_own(w, p, stage), accumulate, p)
        for w, p in zip(leaves, partitions, strict=True)
    ]

    @partial(jax.checkpoint, policy=policy)
    def group(weights: Any, packet: Any, index: jax.Array, microbatch: jax.Array):
        x, along = packet
        own = [
            w[index] if total is None else _gradient_into(w[index], total[index])
            for w, total in weights
        ]
        first = (index * schedule.stages + stage) * schedule.depth
        layer = begin(along, microbatch * shards + jax.lax.axis_index("data"))
        own = jax.tree.unflatten(structure, own)
        x, sums = _apply_group(layer, own, x, first, schedule)
        return (x, along), sums

    def iterate(carry: tuple[Any, Any, Any], step: jax.Array) -> tuple[Any, None]:
        arrived, waiting, total = carry
        packet, waiting = _enter_and_leave(arrived, waiting, step, stage, schedule)
        turn, index = jnp.divmod((step - stage) // schedule.stages, schedule.circular_repeats)
        microbatch = turn * schedule.stages + (step - stage) % schedule.stages
        active = (step >= stage) & (microbatch < schedule.microbatches)
        packet, sums = group(weights, packet, index, microbatch)
        total = jax.tree.map(lambda t, s: t.at[index].add(jnp.where(active, s, 0)), total, sums)
        return (_shift(packet, +1, schedule), waiting, total), None

    packet = jax.tree.map(lambda a: jnp.zeros_like(a[0]), waiting)
    number = jnp.int32(0)
    sums = jax.eval_shape(group, weights, packet, number, number)[1]
    total = jax.tree.map(lambda s: jnp.zeros((schedule.circular_repeats, *s.shape), s.dtype), sums)
    (arrived, waiting, total), _ = jax.lax.scan(
        iterate, (packet, waiting, total), jnp.arange(schedule.iterations)
    )
    _, (x, _) = _enter_and_leave(arrived, waiting, schedule.iterations, stage, schedule)
    x = jax.tree.map(lambda a: _join(jnp.roll(a, -schedule.stages, axis=0)), x)
    return x, jax.tree.map(lambda t: t[:, None, None], total)


def _apply_group(
    layer: Layer, weights: Any, x: Any, first: jax.Array, schedule: Schedule
) -> tuple[Any, Any]:
    """Applies the layers of a group, whose first has the index `first`. Layers beyond the last one
    of the model are padding and leave x unchanged."""
    padded = schedule.layers % (schedule.stages * schedule.circular_repeats)

    def body(x: Any, inputs: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        number, weights = inputs
        new, sums = layer(weights, x, number)
        if padded:
            exists = number < schedule.layers
            new = jax.tree.map(lambda a, b: jnp.where(exists, a, b), new, x)
            sums = jax.tree.map(lambda s: jnp.where(exists, s, 0), sums)
        return new, sums

    return jax.lax.scan(body, x, (first + jnp.arange(schedule.depth), weights))


def _enter_and_leave(
    arrived: Any, waiting: Any, step: jax.Array | int, stage: jax.Array, schedule: Schedule
) -> tuple[Any, Any]:
    """(input of the stage in this iteration, micro-batches that wait after it).

    While a turn enters, stage 0 takes the micro-batch in the current slot and puts the finished one
    that arrived into its place. Then the slot moves to the previous stage, from stage 0 to the
    last.
    """
    turn, within = jnp.divmod(step, schedule.stages * schedule.circular_repeats)
    entering = within < schedule.stages
    slot = (turn * schedule.stages + within) % (schedule.microbatches // schedule.stages)
    first = stage == 0
    held = jax.tree.map(lambda a: a[slot], waiting)
    packet = jax.tree.map(lambda h, a: jnp.where(first & entering, h, a), held, arrived)
    replaced = jax.tree.map(lambda h, a: jnp.where(first, a, h), held, arrived)
    moved = _shift(replaced, -1, schedule)
    waiting = jax.tree.map(
        lambda a, m, h: a.at[slot].set(jnp.where(entering, m, h)), waiting, moved, held
    )
    return packet, waiting


def _shift(packet: Any, by: int, schedule: Schedule) -> Any:
    """Sends to the stage `by` further on the ring."""
    ring = [(stage, (stage + by) % schedule.stages) for stage in range(schedule.stages)]
    return jax.lax.ppermute(packet, "pipe", ring)


def _with_accumulator(
    w: jax.Array, dtype: str, partition: PartitionSpec
) -> tuple[jax.Array, jax.Array | None]:
    """(weight, gradient accumulator).

    The accumulator is an array of zeros of the given dtype whose gradient is that of the weight,
    summed over iterations. The forward pass never materializes it. None for integers, the codes of
    quantized weights.
    """
    if not jnp.issubdtype(w.dtype, jnp.floating):
        return w, None

    @jax.custom_vjp
    def zeros(w: jax.Array) -> jax.Array:
        return jnp.zeros(w.shape, dtype)

    zeros.defvjp(lambda w: (zeros(w), None), lambda _, gradient: (gradient.astype(w.dtype),))
    return jax.lax.stop_gradient(w), _constrain(zeros(w), partition)


@jax.custom_vjp
def _gradient_into(w: jax.Array, total: jax.Array) -> jax.Array:
    """Returns the weight; its gradient flows to `total`."""
    return w


def _gradient_into_forward(w: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    return w, jnp.zeros((), total.dtype)


def _gradient_into_backward(like: jax.Array, gradient: jax.Array) -> tuple[None, jax.Array]:
    return None, gradient.astype(like.dtype)


_gradient_into.defvjp(_gradient_into_forward, _gradient_into_backward)


# Leading axes of a weight that is split into groups: [circular_repeats, stages, depth].
_LEADING = 3


def _by_stage(w: jax.Array, partition: PartitionSpec, schedule: Schedule) -> jax.Array:
    """Splits a weight into groups: [layers, ...] -> [circular_repeats, stages, depth, ...], padded
    with zeros.

    An axis that `pipe` shards becomes three: the part that other mesh axes shard, the part that
    `pipe` shards, and the remainder. The weight can then be moved to its stage without undoing the
    other shardings.
    """
    groups = (schedule.circular_repeats, schedule.stages, schedule.depth)
    padding = groups[0] * groups[1] * groups[2] - schedule.layers
    w = jnp.pad(w, [(0, padding)] + [(0, 0)] * (w.ndim - 1)) if padding else w
    w = w.reshape(*groups, *w.shape[1:])
    axis = _pipe_axis(partition)
    if axis is None or axis == 1:
        return w
    others = _without_pipe(partition[axis - _LEADING + 1])
    ways = math.prod(sharding.active_mesh().shape[name] for name in others)
    w = w.reshape(*w.shape[:axis], ways, schedule.stages, -1, *w.shape[axis + 1 :])
    return sharding.constrain(w, _in_parts(partition, "pipe"))


def _in_parts(partition: PartitionSpec, pipe: str | None) -> PartitionSpec:
    """PartitionSpec of a weight in groups with an axis split in three; `pipe` shards the second."""
    rest = [_without_pipe(part) or None for part in partition[1:]]
    at = _pipe_axis(partition) - _LEADING
    return PartitionSpec(*(None,) * _LEADING, *rest[: at + 1], pipe, None, *rest[at + 1 :])


def _pipe_axis(partition: PartitionSpec) -> int | None:
    """The axis of a weight in groups that `pipe` shards: 1 if that is the axis of the layers, None
    without one."""
    sharded = [i for i, part in enumerate(partition) if "pipe" in sharding.split_over(part)]
    if not sharded:
        return None
    return sharded[0] + _LEADING - 1 if sharded[0] else 1


def _without_pipe(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return tuple(name for name in sharding.split_over(part) if name != "pipe")


def _on_pipe(partition: PartitionSpec) -> PartitionSpec:
    """The manual part of a PartitionSpec in `pipeline`'s shard_map."""
    axis = _pipe_axis(partition)
    if axis is None:
        return PartitionSpec()
    return PartitionSpec(*(None,) * (axis if axis == 1 else axis + 1), "pipe")


def _own(w: jax.Array, partition: PartitionSpec, stage: jax.Array) -> jax.Array:
    """The groups of this stage: [circular_repeats, depth, ...]."""
    axis = _pipe_axis(partition)
    if axis is None:
        w = jax.lax.dynamic_slice_in_dim(w, stage, 1, axis=1)
    elif axis > 1:
        w = _all_to_all(w, 1, axis + 1, _in_parts(partition, None))
        w = w.reshape(*w.shape[:axis], -1, *w.shape[axis + 3 :])
    return _constrain(w[:, 0], partition)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_to_all(w: jax.Array, split: int, concat: int, parts: PartitionSpec) -> jax.Array:
    """All-to-all over `pipe` in a shard_map over all axes: with the other axes left to it, XLA's
    partitioner would all-gather over them first."""
    exchange = partial(
        jax.lax.all_to_all, axis_name="pipe", split_axis=split, concat_axis=concat, tiled=True
    )
    mesh = jax.sharding.get_abstract_mesh()
    axes = set(sharding.remaining(*mesh.axis_names))
    return jax.shard_map(
        exchange, mesh=mesh, in_specs=parts, out_specs=parts, axis_names=axes, check_vma=False
    )(w)


def _all_to_all_forward(
    w: jax.Array, split: int, concat: int, parts: PartitionSpec
) -> tuple[jax.Array, None]:
    return _all_to_all(w, split, concat, parts), None


def _all_to_all_backward(
    split: int, concat: int, parts: PartitionSpec, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (_all_to_all(gradient, concat, split, parts),)


_all_to_all.defvjp(_all_to_all_forward, _all_to_all_backward)


def _constrain(w: jax.Array, partition: PartitionSpec) -> jax.Array:
    """Keeps the weights of a stage sharded over the other mesh axes."""
    rest = [_without_pipe(part) or None for part in partition[1:]]
    return sharding.constrain(w, PartitionSpec(None, None, *rest))


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B/parts, ...] such that every device keeps its rows."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _join(x: jax.Array) -> jax.Array:
    """The inverse of _split."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
