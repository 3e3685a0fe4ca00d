"""Dispatch of tokens to experts: dropless by grouped matmuls, or within a capacity per expert."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from kernels_pallas import grouped_matmul, placement
from lm.model.expert_parallel import buffer_rows, on_experts
from lm.model.ffn import ACTIVATIONS
from lm.parallel.sharding import (
    context_parallel_size,
    is_sharded,
    partition,
    remaining,
    shard,
    shard_map,
    split_over,
    weight_partition,
)


def token_partition() -> PartitionSpec:
    """Partition of the batch and sequence axes of activations, for shard_map."""
    return PartitionSpec(remaining("pipe", "data", "fsdp", "expert"), "context")


class Experts(NamedTuple):
    """Weights of all experts, or of those on this device."""

    activation: str
    gate_edf: jax.Array
    up_edf: jax.Array
    down_efd: jax.Array

    @property
    def count(self) -> int:
        """Number of experts, or of those on this device."""
        return self.gate_edf.shape[0]


def dropless(
    x_btd: jax.Array, chosen_btk: jax.Array, weights_btk: jax.Array, experts: Experts
) -> jax.Array:
    """y_btd: every token through all of its experts, for any load.

    Tokens are sorted by expert for one grouped matmul per weight."""
    activation, *arrays = experts
    if not is_sharded():
        feed = partial(_feed, activation, arrays)
        return _sorted_by_expert(x_btd, chosen_btk, weights_btk, experts.count, feed)
    wide = weight_partition(("expert", "embed", "mlp"), experts.gate_edf.shape)
    narrow = weight_partition(("expert", "mlp", "embed"), experts.down_efd.shape)
    embed = wide[1] or ()

    def local(
        x_btd: jax.Array, chosen_btk: jax.Array, weights_btk: jax.Array, *arrays: jax.Array
    ) -> jax.Array:
        # Cast before tokens are repeated: gradients are then summed over `tensor` once per token
        # instead of once per assignment.
        x_btd, weights_btk = (
            jax.lax.pcast(a, "tensor", to="varying") for a in (x_btd, weights_btk)
        )
        mine = [
            jax.lax.all_gather(w, embed, axis=axis, tiled=True)
            for w, axis in zip(arrays, (1, 1, 2), strict=True)
        ]
        feed = partial(_feed, activation, mine)
        if mine[0].shape[0] < experts.count:
            feed = partial(_feed_far, activation, mine, chosen_btk.shape)
        y_btd = _sorted_by_expert(x_btd, chosen_btk, weights_btk, experts.count, feed)
        if scattered:
            return jax.lax.psum_scatter(y_btd, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(y_btd, "tensor")

    tokens = token_partition()
    scattered = "tensor" in split_over(partition(x_btd.shape, "batch", "stream", "embed")[1])
    stream = PartitionSpec(tokens[0], ("context", "tensor")) if scattered else tokens
    mapped = shard_map(local, (tokens, tokens, tokens, wide, wide, narrow), stream)
    return mapped(x_btd, chosen_btk, weights_btk, *arrays)


def _sorted_by_expert(
    x_btd: jax.Array,
    chosen_btk: jax.Array,
    weights_btk: jax.Array,
    experts: int,
    feed: Callable[[tuple[jax.Array, jax.Array], jax.Array], jax.Array],
) -> jax.Array:
    """Sorts assignments by expert, calls feed((rows, weights), sizes_e), and sums the results per
    token. Assignments to the non-existent expert `experts` add nothing."""
    chosen_m = chosen_btk.reshape(-1)
    order_m = jnp.argsort(chosen_m)
    place_m = jnp.argsort(order_m)
    sizes_e = _count(chosen_m, experts)
    x_md = _move(_per_choice(x_btd, chosen_btk), order_m, place_m)
    weights_m1 = _move(weights_btk.reshape(-1, 1), order_m, place_m)
    y_md = _move(feed((x_md, weights_m1), sizes_e), place_m, order_m)
    return y_md.reshape(*chosen_btk.shape, -1).sum(2)


def _feed(
    activation: str,
    arrays: Sequence[jax.Array],
    rows: tuple[jax.Array, jax.Array],
    sizes_e: jax.Array,
) -> jax.Array:
    """Applies each row's expert. Rows are weighted before the last matmul, so that the backward
    pass does not need its result."""
    gate_edf, up_edf, down_efd = arrays
    x_md, weights_m1 = rows
    gate_mf = ACTIVATIONS[activation](grouped_matmul(x_md, gate_edf, sizes_e))
    up_mf = grouped_matmul(x_md, up_edf, sizes_e)
    return grouped_matmul((gate_mf * up_mf * weights_m1).astype(x_md.dtype), down_efd, sizes_e)


def _feed_far(
    activation: str,
    mine: Sequence[jax.Array],
    choices: tuple[int, int, int],
    rows: tuple[jax.Array, jax.Array],
    sizes_e: jax.Array,
) -> jax.Array:
    """`_feed` with expert parallelism: sends rows to the devices of their experts and back."""
    b, t, k = choices
    most = jax.lax.axis_size("expert") * b * t * min(k, mine[0].shape[0])

    def feed(rows: tuple[jax.Array, jax.Array], sizes_g: jax.Array, mine: Any) -> jax.Array:
        return _feed(activation, mine, rows, sizes_g)

    return on_experts(feed, buffer_rows(b * t * k, most), sizes_e, rows, mine)


def within_capacity(
    x_btd: jax.Array, chosen_btk: jax.Array, weights_btk: jax.Array, experts: Experts, slots: int
) -> jax.Array:
    """y_btd: each expert takes at most `slots` assignments of a sequence.

    Slots are counted per sequence, so the result does not depend on the mesh. Between the two
    sharding constraints on each side XLA inserts an all-to-all over the expert axis."""
    b, t, d = x_btd.shape
    e, k = experts.count, chosen_btk.shape[-1]
    # With context parallelism tokens are not in the order of the sequence.
    index_t = placement(t, context_parallel_size()) if context_parallel_size() > 1 else np.arange(t)
    fill = jax.vmap(lambda chosen_m: _fill_slots(chosen_m, np.repeat(index_t, k), e, slots))
    source_bs, slot_bm = fill(chosen_btk.reshape(b, t * k))
    move = jax.vmap(_move)

    x_bsd = move(_per_choice(x_btd, chosen_btk).reshape(b, t * k, d), source_bs, slot_bm)
    x_bsd = shard(x_bsd, "batch", "capacity", "embed")
    x_becd = shard(x_bsd.reshape(b, e, slots, d), "group", "expert", "capacity", "embed")
    gate_becf = jnp.einsum("becd,edf->becf", x_becd, experts.gate_edf)
    gate_becf = ACTIVATIONS[experts.activation](
        shard(gate_becf, "group", "expert", "capacity", "mlp")
    )
    up_becf = jnp.einsum("becd,edf->becf", x_becd, experts.up_edf)
    y_becd = jnp.einsum("becf,efd->becd", gate_becf * up_becf, experts.down_efd)
    y_becd = shard(y_becd, "group", "expert", "capacity", "embed")
    y_bsd = shard(y_becd.reshape(b, e * slots, d), "batch", "capacity", "embed")
    return _combine(move(y_bsd, slot_bm, source_bs), weights_btk)


def _fill_slots(
    chosen_m: jax.Array, index_m: np.ndarray, experts: int, slots: int
) -> tuple[jax.Array, jax.Array]:
    """Gives the slots of each expert, e * slots .. (e + 1) * slots - 1, to its first assignments in
    the order of `index`, the place of the token in the sequence.

    Returns the assignment in each slot [E * slots], M if the slot is empty, and the slot of each
    assignment [M], E * slots if it was dropped.
    """
    order_m = jnp.lexsort((index_m, chosen_m))
    sizes_e = _count(chosen_m, experts)
    starts_e = jnp.cumsum(sizes_e) - sizes_e
    places_ec = jnp.arange(slots) + starts_e[:, None]
    taken_ec = jnp.arange(slots) < sizes_e[:, None]
    source_ec = jnp.where(taken_ec, order_m.at[places_ec].get(mode="clip"), chosen_m.size)

    rank_m = jnp.argsort(order_m) - starts_e.at[chosen_m].get(mode="clip")
    kept_m = (chosen_m < experts) & (rank_m < slots)
    slot_m = jnp.where(kept_m, chosen_m * slots + rank_m, experts * slots)
    return source_ec.reshape(-1), slot_m


def _count(chosen_m: jax.Array, experts: int) -> jax.Array:
    return (chosen_m[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)


def _per_choice(x_btd: jax.Array, chosen_btk: jax.Array) -> jax.Array:
    """One row for each assignment: [B * T * K, D]."""
    d = x_btd.shape[-1]
    return jnp.broadcast_to(x_btd[:, :, None], (*chosen_btk.shape, d)).reshape(-1, d)


def _combine(y: jax.Array, weights_btk: jax.Array) -> jax.Array:
    """Inverse of `_per_choice`: the weighted sum over the choices of each token."""
    y_btkd = y.reshape(*weights_btk.shape, y.shape[-1])
    return jnp.einsum("btkd,btk->btd", y_btkd, weights_btk.astype(y.dtype))


@jax.custom_vjp
def _move(x_md: jax.Array, source_n: jax.Array, target_m: jax.Array) -> jax.Array:
    """Gathers rows: y[n] = x[source[n]], or zero where source[n] is M.

    `target` is the inverse permutation: row m goes to y[target[m]], or is dropped where target[m]
    is N. With both, the gradient is a gather too instead of a scatter-add.
    """
    return x_md.at[source_n].get(mode="fill", fill_value=0)


def _move_forward(x_md: jax.Array, source_n: jax.Array, target_m: jax.Array):
    return _move(x_md, source_n, target_m), (source_n, target_m)


def _move_backward(places: tuple[jax.Array, jax.Array], dy_nd: jax.Array):
    source_n, target_m = places
    return _move(dy_nd, target_m, source_n), None, None


_move.defvjp(_move_forward, _move_backward)
