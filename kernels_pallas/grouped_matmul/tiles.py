"""Grouped matmul on CPU: a loop over tiles of rows of one group.

XLA's ragged_dot on CPU expands x to [E, M, D] and multiplies every row with every matrix.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.varying import varying_alike

# Rows per tile: enough to amortize copying a matrix, few enough to waste little on small groups.
ROWS = 512


def product(
    x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array, transposed: bool = False
) -> jax.Array:
    """Returns y [M, F]; `transposed` maps x [M, F] to y [M, D]."""

    def write(y, group, at, inside):
        w_df = w_edf[group].T if transposed else w_edf[group]
        tile = jax.lax.dynamic_slice_in_dim(x_md, at, inside.size) @ w_df
        # A tile may overlap its neighbours; keep their rows.
        before = jax.lax.dynamic_slice_in_dim(y, at, inside.size)
        tile = jnp.where(inside[:, None], tile, before)
        return jax.lax.dynamic_update_slice_in_dim(y, tile, at, 0)

    shape = (x_md.shape[0], w_edf.shape[1 if transposed else 2])
    start, _ = varying_alike(jnp.zeros(shape, x_md.dtype), x_md)
    return _over_tiles(write, start, group_sizes_e, x_md.shape[0])


def weight_gradient(
    x_md: jax.Array, dy_mf: jax.Array, group_sizes_e: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Returns dw [E, D, F], summed in float32."""

    def add(dw_edf, group, at, inside):
        x = jax.lax.dynamic_slice_in_dim(x_md, at, inside.size)
        dy = jax.lax.dynamic_slice_in_dim(dy_mf, at, inside.size)
        x, dy = jnp.where(inside[:, None], x, 0), jnp.where(inside[:, None], dy, 0)
        tile = jnp.einsum("md,mf->df", x, dy, preferred_element_type=jnp.float32)
        return dw_edf.at[group].add(tile)

    shape = (group_sizes_e.shape[0], x_md.shape[1], dy_mf.shape[1])
    start, _ = varying_alike(jnp.zeros(shape, jnp.float32), x_md)
    return _over_tiles(add, start, group_sizes_e, x_md.shape[0]).astype(dtype)


def _over_tiles(step, carry: jax.Array, group_sizes_e: jax.Array, rows: int) -> jax.Array:
    """Folds step(carry, group, first row, mask of the group's rows) over all tiles."""
    size = min(ROWS, rows)
    ends_e = jnp.cumsum(group_sizes_e)
    tiles_e = -(-group_sizes_e // size)
    tile_ends_e = jnp.cumsum(tiles_e)

    def body(i, carry):
        group = jnp.searchsorted(tile_ends_e, i, side="right", method="compare_all")
        place = i - (tile_ends_e[group] - tiles_e[group])
        first = ends_e[group] - group_sizes_e[group] + place * size
        at = jnp.minimum(first, rows - size)
        row = at + jnp.arange(size)
        return step(carry, group, at, (row >= first) & (row < ends_e[group]))

    return jax.lax.fori_loop(0, tile_ends_e[-1], body, carry)
