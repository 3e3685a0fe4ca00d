"""Layers in stages: each device of the mesh axis `pipe` holds some of a stack, and micro-batches
pass from stage to stage (GPipe, arXiv:1811.06965; circular, or interleaved, arXiv:2104.04473).

A stage holds `circular_repeats` groups of consecutive layers; the groups lie around the ring of stages, so
that a micro-batch goes round it `circular_repeats` times. Micro-batches enter in turns of as many as there
are stages: the last of a turn has entered when the first one comes back, to begin its next round or
to leave. Nobody waits but at the two ends, and nothing is put by. Two stages, two circular_repeats and the
micro-batches a b c d take 9 iterations, in 8 of which each stage works:

    stage 0   a1 b1 a2 b2 c1 d1 c2 d2  .
    stage 1    . a1 b1 a2 b2 c1 d1 c2 d2

Outside the stages the batch is split over `pipe` too, and it stays so: the micro-batches that wait
lie on all stages and move down, one slot at each iteration, to stage 0, which puts a finished one
where it took a fresh one. So embedding and head, done before and after, cost each stage its share.
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
    """How `layers` (repeats of the model's pattern) pass through a pipeline.

    stages        devices along `pipe`
    circular_repeats        groups of layers that each stage holds; 1 is GPipe
    microbatches  into which the batch is split, a multiple of `stages`
    """

    layers: int
    stages: int
    circular_repeats: int
    microbatches: int

    def __post_init__(self) -> None:
        if self.microbatches % self.stages:
            raise UserError(
                f"microbatches={self.microbatches} must be a multiple of mesh.pipe={self.stages}: "
                "they enter the pipeline in turns of as many."
            )
        if self.layers < self.stages * self.circular_repeats:
            raise UserError(
                f"mesh.pipe={self.stages} times place.circular_repeats={self.circular_repeats} is more than the "
                f"{self.layers} repeats of the model's pattern; take fewer stages or circular_repeats."
            )

    @property
    def depth(self) -> int:
        """Layers in a group. Where they do not divide evenly, the last groups have fewer, and wait
        for the others."""
        return -(-self.layers // (self.stages * self.circular_repeats))

    @property
    def iterations(self) -> int:
        """Trips of the compiled loop, in each of which every stage runs one group."""
        return self.microbatches * self.circular_repeats + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of the stages' time in which they do nothing of use: while the pipeline fills
        and drains, and where groups have fewer layers than the fullest."""
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
    """All layers of a stack, one after another, on the mesh in use.

    Args:
        begin: begin(along, microbatch), of one micro-batch and its number, gives what is done for
            each layer: layer(weights, x, number) -> (x, sums).
        stacked: weights, each with a leading axis of the layers.
        x: [B, ...], what layers change.
        along: [B, ...] arrays that travel with x; not differentiated.
        partitions: how the leaves of `stacked` lie on the mesh. Where `pipe` splits their layers
            and a stage has one group, each stage has what it needs; else it is brought there, by an
            all-to-all if `pipe` splits another axis.
        accumulate: the dtype in which gradients of the weights are summed over micro-batches.
        policy: of jax.checkpoint: what the backward pass finds kept, besides the input of each
            group. The weights of a group must not be among it.

    Returns:
        x after the last layer, and the sums over micro-batches, stacked by layer.
    """
    leaves, structure = jax.tree.flatten(stacked)
    leaves = [_by_stage(w, p, schedule) for w, p in zip(leaves, partitions, strict=True)]
    # By hand over `data` too: there the gradients of the weights are summed once, after the loop.
    shards = sharding.active_mesh().shape["data"]

    def on_stage(leaves: list[jax.Array], x: Any, along: Any) -> tuple[Any, Any]:
        stage = jax.lax.axis_index("pipe")
        slots = schedule.microbatches // schedule.stages
        waiting = jax.tree.map(lambda a: _split(a, slots), (x, along))
        weights = [
            _with_sum(_own(w, p, stage), accumulate, p)
            for w, p in zip(leaves, partitions, strict=True)
        ]

        @partial(jax.checkpoint, policy=policy)
        def group(weights: Any, packet: Any, index: jax.Array, microbatch: jax.Array):
            x, along = packet
            chosen = [_summed_into(w[index], total[index]) for w, total in weights]
            first = (index * schedule.stages + stage) * schedule.depth
            layer = begin(along, microbatch * shards + jax.lax.axis_index("data"))
            chosen = jax.tree.unflatten(structure, chosen)
            x, sums = _in_turn(layer, chosen, x, first, schedule)
            return (x, along), sums

        def iterate(carry: tuple[Any, Any, Any], step: jax.Array) -> tuple[Any, None]:
            arrived, waiting, total = carry
            packet, waiting = _exchange(arrived, waiting, step, stage, schedule)
            turn, index = jnp.divmod((step - stage) // schedule.stages, schedule.circular_repeats)
            microbatch = turn * schedule.stages + (step - stage) % schedule.stages
            here = (step >= stage) & (microbatch < schedule.microbatches)
            packet, sums = group(weights, packet, index, microbatch)
            total = jax.tree.map(lambda t, s: t.at[index].add(jnp.where(here, s, 0)), total, sums)
            return (_pass(packet, +1, schedule), waiting, total), None

        packet = jax.tree.map(lambda a: jnp.zeros_like(a[0]), waiting)
        number = jnp.int32(0)
        sums = jax.eval_shape(group, weights, packet, number, number)[1]
        total = jax.tree.map(
            lambda s: jnp.zeros((schedule.circular_repeats, *s.shape), s.dtype), sums
        )
        (arrived, waiting, total), _ = jax.lax.scan(
            iterate, (packet, waiting, total), jnp.arange(schedule.iterations)
        )
        _, (x, _) = _exchange(arrived, waiting, schedule.iterations, stage, schedule)
        x = jax.tree.map(lambda a: _join(jnp.roll(a, -schedule.stages, axis=0)), x)
        return x, jax.tree.map(lambda t: t[:, None, None], total)

    rows, by_device = PartitionSpec(("pipe", "data")), PartitionSpec(None, "pipe", "data")
    x, sums = jax.shard_map(
        on_stage,
        mesh=sharding.active_mesh(),
        in_specs=([_on_pipe(p) for p in partitions], rows, rows),
        out_specs=(rows, by_device),
        axis_names={"pipe", "data"},
        # The arrays that layers make for their own loops do not say that they vary by device.
        check_vma=False,
    )(leaves, x, along)

    def by_layer(total: jax.Array) -> jax.Array:
        return total.sum(2).reshape(-1, *total.shape[4:])[: schedule.layers]

    return x, jax.tree.map(by_layer, sums)


def _in_turn(
    layer: Layer, weights: Any, x: Any, first: jax.Array, schedule: Schedule
) -> tuple[Any, Any]:
    """The layers of a group, which is numbered from `first`; those beyond the last one of the model
    are stand-ins and change nothing."""
    padded = schedule.layers % (schedule.stages * schedule.circular_repeats)

    def body(x: Any, inputs: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        number, weights = inputs
        new, sums = layer(weights, x, number)
        if padded:
            real = number < schedule.layers
            new = jax.tree.map(lambda a, b: jnp.where(real, a, b), new, x)
            sums = jax.tree.map(lambda s: jnp.where(real, s, 0), sums)
        return new, sums

    return jax.lax.scan(body, x, (first + jnp.arange(schedule.depth), weights))


def _exchange(
    arrived: Any, waiting: Any, step: jax.Array | int, stage: jax.Array, schedule: Schedule
) -> tuple[Any, Any]:
    """(what a stage works on in this iteration, what waits after it).

    While a turn enters, stage 0 takes the micro-batch of the slot at hand and leaves there the one
    that came back finished; then that slot moves down by a stage, and from stage 0 to the last.
    """
    turn, within = jnp.divmod(step, schedule.stages * schedule.circular_repeats)
    entering = within < schedule.stages
    slot = (turn * schedule.stages + within) % (schedule.microbatches // schedule.stages)
    first = stage == 0
    held = jax.tree.map(lambda a: a[slot], waiting)
    taken = jax.tree.map(lambda h, a: jnp.where(first & entering, h, a), held, arrived)
    left = jax.tree.map(lambda h, a: jnp.where(first, a, h), held, arrived)
    moved = _pass(left, -1, schedule)
    waiting = jax.tree.map(
        lambda a, m, h: a.at[slot].set(jnp.where(entering, m, h)), waiting, moved, held
    )
    return taken, waiting


def _pass(packet: Any, by: int, schedule: Schedule) -> Any:
    """To the stage `by` further on the ring."""
    ring = [(stage, (stage + by) % schedule.stages) for stage in range(schedule.stages)]
    return jax.lax.ppermute(packet, "pipe", ring)


def _with_sum(w: jax.Array, dtype: str, partition: PartitionSpec) -> tuple[jax.Array, jax.Array]:
    """The weight, and zeros in whose place its gradient is summed over the iterations: these are
    of a dtype of their own, and never exist in the forward pass."""

    @jax.custom_vjp
    def zeros(w: jax.Array) -> jax.Array:
        return jnp.zeros(w.shape, dtype)

    zeros.defvjp(lambda w: (zeros(w), None), lambda _, gradient: (gradient.astype(w.dtype),))
    return jax.lax.stop_gradient(w), _constrain(zeros(w), partition)


@jax.custom_vjp
def _summed_into(w: jax.Array, total: jax.Array) -> jax.Array:
    """The weight, whose gradient goes to `total`."""
    return w


def _summed_into_forward(w: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    return w, jnp.zeros((), total.dtype)


def _summed_into_backward(like: jax.Array, gradient: jax.Array) -> tuple[None, jax.Array]:
    return None, gradient.astype(like.dtype)


_summed_into.defvjp(_summed_into_forward, _summed_into_backward)


# Where the axes of a weight begin, once its layers are [circular_repeats, stages, depth].
_REST = 3


def _by_stage(w: jax.Array, partition: PartitionSpec, schedule: Schedule) -> jax.Array:
    """[layers, ...] -> [circular_repeats, stages, depth, ...], filled up with zeros. An axis that `pipe`
    splits becomes three: what the other mesh axes split, what `pipe` splits, and the rest. So it is
    brought to a stage without the compiler having to undo the other splits."""
    groups = (schedule.circular_repeats, schedule.stages, schedule.depth)
    short = groups[0] * groups[1] * groups[2] - schedule.layers
    w = jnp.pad(w, [(0, short)] + [(0, 0)] * (w.ndim - 1)) if short else w
    w = w.reshape(*groups, *w.shape[1:])
    axis = _pipe_axis(partition)
    if axis is None or axis == 1:
        return w
    others = _without_pipe(partition[axis - _REST + 1])
    ways = math.prod(sharding.active_mesh().shape[name] for name in others)
    w = w.reshape(*w.shape[:axis], ways, schedule.stages, -1, *w.shape[axis + 1 :])
    return sharding.constrain(w, _in_parts(partition, "pipe"))


def _in_parts(partition: PartitionSpec, pipe: str | None) -> PartitionSpec:
    """Of a weight in groups with an axis in three parts, the middle one split by `pipe`."""
    rest = [_without_pipe(part) or None for part in partition[1:]]
    at = _pipe_axis(partition) - _REST
    return PartitionSpec(*(None,) * _REST, *rest[: at + 1], pipe, None, *rest[at + 1 :])


def _pipe_axis(partition: PartitionSpec) -> int | None:
    """The axis that `pipe` splits, of a weight in groups."""
    split = [i for i, part in enumerate(partition) if "pipe" in sharding.split_over(part)]
    return split[0] + _REST - 1 if split and split[0] else 1 if split else None


def _without_pipe(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return tuple(name for name in sharding.split_over(part) if name != "pipe")


def _on_pipe(partition: PartitionSpec) -> PartitionSpec:
    axis = _pipe_axis(partition)
    if axis is None:
        return PartitionSpec()
    return PartitionSpec(*(None,) * (axis if axis == 1 else axis + 1), "pipe")


def _own(w: jax.Array, partition: PartitionSpec, stage: jax.Array) -> jax.Array:
    """This stage's part [circular_repeats, depth, ...] of a weight in groups."""
    axis = _pipe_axis(partition)
    if axis is None:
        w = jax.lax.dynamic_slice_in_dim(w, stage, 1, axis=1)
    elif axis > 1:
        w = _exchanged(w, 1, axis + 1, _in_parts(partition, None))
        w = w.reshape(*w.shape[:axis], -1, *w.shape[axis + 3 :])
    return _constrain(w[:, 0], partition)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _exchanged(w: jax.Array, split: int, concat: int, parts: PartitionSpec) -> jax.Array:
    """All-to-all over `pipe`, by hand over the other axes too: XLA's partitioner would first gather
    what they split."""
    exchange = partial(
        jax.lax.all_to_all, axis_name="pipe", split_axis=split, concat_axis=concat, tiled=True
    )
    mesh = jax.sharding.get_abstract_mesh()
    axes = set(sharding.remaining(*mesh.axis_names))
    return jax.shard_map(
        exchange, mesh=mesh, in_specs=parts, out_specs=parts, axis_names=axes, check_vma=False
    )(w)


def _exchanged_forward(
    w: jax.Array, split: int, concat: int, parts: PartitionSpec
) -> tuple[jax.Array, None]:
    return _exchanged(w, split, concat, parts), None


def _exchanged_backward(
    split: int, concat: int, parts: PartitionSpec, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (_exchanged(gradient, concat, split, parts),)


_exchanged.defvjp(_exchanged_forward, _exchanged_backward)


def _constrain(w: jax.Array, partition: PartitionSpec) -> jax.Array:
    """A stage's part of a weight, split over the other axes of the mesh as the whole is."""
    rest = [_without_pipe(part) or None for part in partition[1:]]
    return sharding.constrain(w, PartitionSpec(None, None, *rest))


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B/parts, ...], each device of the other axes keeping its rows."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _join(x: jax.Array) -> jax.Array:
    """The inverse of _split."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
