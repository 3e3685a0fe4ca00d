"""Expert parallelism: sends rows to the devices that hold their experts, and back, by all-to-all
over the mesh axis `expert`.

Each of P devices has M rows sorted by expert, and G of the P * G = E experts. A device receives the
rows of its experts from all devices in the order (expert, source), at most the R rows of its buffer
per round. An even load is M rows. One round suffices while no device receives more than R / M times
that; a higher load takes more rounds, and no row is dropped.

Each row moves once, where an all-gather of the tokens would send it to P - 1 devices. Memory is
that of R rows instead of all rows of all devices. Where the compiler has no ragged all-to-all
(above 16 chips of v5e, and on other platforms than TPU) rows are all-gathered; the numbers are the
same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.blocks import chip
from kernels_pallas.varying import varying_alike

AXIS = "expert"
# Size of the buffer in even loads. Balanced routers stay below. Memory grows with it, and a second
# round reads the experts' weights once more.
SLACK = 1.5
# Largest v5e mesh for which libtpu 0.0.42 compiles a ragged all-to-all; it fails on 4 x 8.
MOST_V5E = 16

Rows = Any  # a pytree of arrays, [M, ...] at the tokens and [R, ...] at the experts
Feed = Callable[[Rows, jax.Array, Any], jax.Array]


def buffer_rows(rows: int, most: int) -> int:
    """Size R of the buffer, for M `rows` of which one device can receive at most `most`."""
    return min(-(-int(SLACK * rows) // 8) * 8, most)


def on_experts(feed: Feed, buffer: int, counts_e: jax.Array, rows: Rows, weights: Any) -> jax.Array:
    """Applies `feed` to each row on the device of its expert; returns y [M, ...].

    Call it inside a shard_map over `expert`. The backward pass fetches the rows again and
    recomputes `feed`.

    Args:
        feed: feed(rows [R, ...], sizes_g, weights) -> y [R, ...]. The first sizes[0] rows are for
            this device's first expert, and so on; rows past the sum are zero.
        buffer: R.
        counts_e: number of this device's rows for each expert; rows are in this order.
        weights: of this device's experts.
    """
    counts_pe = jax.lax.all_gather(counts_e, AXIS)
    leaves, structure = jax.tree.flatten((rows, weights))
    counts_pe, *leaves = varying_alike(counts_pe, *leaves)
    rows, weights = jax.tree.unflatten(structure, leaves)
    return _on_experts(feed, buffer, counts_pe, rows, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _on_experts(feed: Feed, buffer: int, counts_pe: jax.Array, rows: Rows, weights: Any):
    def body(number, y):
        window = _window(counts_pe, number, buffer)
        received = _fetch(window, buffer, rows)
        return _return(window, feed(received, window.sizes_g, weights), y)

    first = jax.tree.leaves(rows)[0]
    return jax.lax.fori_loop(0, _rounds(counts_pe, buffer), body, _zeros(first, first.shape))


def _forward(feed: Feed, buffer: int, counts_pe: jax.Array, rows: Rows, weights: Any):
    return _on_experts(feed, buffer, counts_pe, rows, weights), (counts_pe, rows, weights)


def _backward(feed: Feed, buffer: int, residuals: tuple[jax.Array, Rows, Any], dy: jax.Array):
    counts_pe, rows, weights = residuals

    def body(number, carry):
        drows, dweights = carry
        window = _window(counts_pe, number, buffer)
        received, dy_received = _fetch(window, buffer, (rows, dy))
        pull = jax.vjp(lambda *a: feed(a[0], window.sizes_g, a[1]), received, weights)[1]
        dreceived, dw = pull(dy_received)
        return _return(window, dreceived, drows), jax.tree.map(jnp.add, dweights, dw)

    start = jax.tree.map(lambda a: _zeros(a, a.shape), (rows, weights))
    drows, dweights = jax.lax.fori_loop(0, _rounds(counts_pe, buffer), body, start)
    return None, drows, dweights


_on_experts.defvjp(_forward, _backward)


class _Window(NamedTuple):
    """The rows of one round: of those that source p has for expert e, `size_pe` rows from
    `source_pe` on, to `target_pe` in the buffer of the expert's device."""

    source_pe: jax.Array
    target_pe: jax.Array
    size_pe: jax.Array

    @property
    def sizes_g(self) -> jax.Array:
        """Rows for each of this device's experts."""
        return _mine(self.size_pe).sum(0)


def _places(counts_pe: jax.Array) -> jax.Array:
    """Offset of the rows of (source, expert) among all rows that the expert's device receives."""
    devices = counts_pe.shape[0]
    total_dg = counts_pe.sum(0).reshape(devices, -1)
    begin_e = (jnp.cumsum(total_dg, 1) - total_dg).reshape(-1)
    return begin_e + jnp.cumsum(counts_pe, 0) - counts_pe


def _rounds(counts_pe: jax.Array, buffer: int) -> jax.Array:
    """Number of rounds of the fullest device, the same on all devices."""
    most = counts_pe.sum(0).reshape(counts_pe.shape[0], -1).sum(1).max()
    return -(-most // buffer)


def _window(counts_pe: jax.Array, number: jax.Array, buffer: int) -> _Window:
    before = number * buffer
    place_pe = _places(counts_pe) - before
    target_pe, end_pe = (jnp.clip(p, 0, buffer) for p in (place_pe, place_pe + counts_pe))
    start_pe = jnp.cumsum(counts_pe, 1) - counts_pe
    return _Window(start_pe + jnp.clip(-place_pe, 0, counts_pe), target_pe, end_pe - target_pe)


def _mine(x_pe: jax.Array) -> jax.Array:
    """[P, G]: the columns of this device's experts."""
    experts = x_pe.shape[1] // x_pe.shape[0]
    first = jax.lax.axis_index(AXIS) * experts
    return jax.lax.dynamic_slice_in_dim(x_pe, first, experts, axis=1)


def _own(x_pe: jax.Array) -> jax.Array:
    """[E]: the row of this device as a source."""
    return jax.lax.dynamic_index_in_dim(x_pe, jax.lax.axis_index(AXIS), keepdims=False)


def _fetch(window: _Window, buffer: int, rows: Rows) -> Rows:
    """The buffer of this device's experts; unused rows are zero."""

    def ragged(window: _Window, x: jax.Array) -> jax.Array:
        sizes = _own(window.size_pe), _mine(window.size_pe).reshape(-1)
        places = _own(window.source_pe), _own(window.target_pe)
        empty = _zeros(x, (buffer, *x.shape[1:]))
        return jax.lax.ragged_all_to_all(
            x, empty, places[0], sizes[0], places[1], sizes[1], axis_name=AXIS
        )

    def gathered(window: _Window, x: jax.Array) -> jax.Array:
        index_r = _index(window, buffer, x.shape[0])
        return jax.lax.all_gather(x, AXIS, tiled=True).at[index_r].get(mode="fill", fill_value=0)

    return jax.tree.map(lambda x: _by_platform(ragged, gathered, window, x), rows)


def _return(window: _Window, rows: Rows, into: Rows) -> Rows:
    """Inverse of `_fetch`: writes rows of the buffer to their places in `into` at their sources."""

    def ragged(window: _Window, x: jax.Array, into: jax.Array) -> jax.Array:
        sizes = _mine(window.size_pe).reshape(-1), _own(window.size_pe)
        places = _mine(window.target_pe).reshape(-1), _mine(window.source_pe).reshape(-1)
        return jax.lax.ragged_all_to_all(
            x, into, places[0], sizes[0], places[1], sizes[1], axis_name=AXIS
        )

    def gathered(window: _Window, x: jax.Array, into: jax.Array) -> jax.Array:
        rows = into.shape[0]
        index_r = _index(window, x.shape[0], rows)
        all_rows = _zeros(x, (jax.lax.axis_size(AXIS) * rows, *x.shape[1:]))
        all_rows = all_rows.at[index_r].set(x, mode="drop")
        return into + jax.lax.psum_scatter(all_rows, AXIS, tiled=True)

    return jax.tree.map(lambda x, y: _by_platform(ragged, gathered, window, x, y), rows, into)


def _by_platform(ragged: Callable, gathered: Callable, *arrays: Any) -> jax.Array:
    if chip() == "v5e" and jax.sharding.get_abstract_mesh().size > MOST_V5E:
        return gathered(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=ragged, default=gathered)


def _index(window: _Window, buffer: int, rows: int) -> jax.Array:
    """Index of each row of this device's buffer among the concatenated P * M rows of all devices;
    P * M for an unused row."""
    source_pg, target_pg, size_pg = map(_mine, window)
    devices = source_pg.shape[0]
    row_r = jnp.arange(buffer)
    slice_r = jnp.searchsorted((target_pg + size_pg).T.reshape(-1), row_r, side="right")
    from_r, expert_r = slice_r % devices, slice_r // devices
    at_r = source_pg.at[from_r, expert_r].get(mode="clip") + row_r
    at_r -= target_pg.at[from_r, expert_r].get(mode="clip")
    return jnp.where(row_r < size_pg.sum(), from_r * rows + at_r, devices * rows)


def _zeros(like: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return varying_alike(jnp.zeros(shape, like.dtype), like)[0]
