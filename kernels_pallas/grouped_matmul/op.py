"""The door: shapes are checked here, in words."""

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import reference


def grouped_matmul(x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    """y[m] = x[m] @ w[group of m]: the first group_sizes[0] rows are group 0, and so on.

    Args:
      x_md: [M, D] rows, sorted by group.
      w_edf: [E, D, F] one matrix per group, in x's dtype.
      group_sizes_e: [E] integers, at least zero, of sum at most M. Rows past the sum give zeros
        and get no gradient.

    Returns:
      [M, F] in x's dtype.

    Raises:
      ValueError: for shapes or dtypes that do not fit together.
    """
    if x_md.ndim != 2 or w_edf.ndim != 3 or group_sizes_e.ndim != 1:
        raise ValueError(
            "grouped_matmul takes x [M, D], w [E, D, F] and group_sizes [E], "
            f"not {x_md.shape}, {w_edf.shape} and {group_sizes_e.shape}."
        )
    if x_md.shape[1] != w_edf.shape[1]:
        raise ValueError(
            f"grouped_matmul: x has width {x_md.shape[1]} but w takes width {w_edf.shape[1]}."
        )
    if w_edf.shape[0] != group_sizes_e.shape[0]:
        raise ValueError(
            f"grouped_matmul: w has {w_edf.shape[0]} groups "
            f"but group_sizes has {group_sizes_e.shape[0]}."
        )
    if x_md.dtype != w_edf.dtype:
        raise ValueError(f"grouped_matmul: x is {x_md.dtype} but w is {w_edf.dtype}.")
    if not jnp.issubdtype(group_sizes_e.dtype, jnp.integer):
        raise ValueError(
            f"grouped_matmul: group_sizes must be integers, not {group_sizes_e.dtype}."
        )
    return reference.grouped_matmul(x_md, w_edf, group_sizes_e)
