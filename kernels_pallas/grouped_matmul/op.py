"""The door: checks shapes in words and chooses the form that runs."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul import reference, tiles
from kernels_pallas.varying import varying_alike


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
    return _grouped_matmul(*varying_alike(x_md, w_edf, group_sizes_e))


@jax.custom_vjp
def _grouped_matmul(x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        x_md, w_edf, group_sizes_e, cpu=tiles.product, default=reference.grouped_matmul
    )


def _forward(x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array):
    return _grouped_matmul(x_md, w_edf, group_sizes_e), (x_md, w_edf, group_sizes_e)


def _backward(residuals: tuple[jax.Array, jax.Array, jax.Array], dy_mf: jax.Array):
    def by_tiles(x_md, w_edf, group_sizes_e, dy_mf):
        dx_md = tiles.product(dy_mf, w_edf, group_sizes_e, transposed=True)
        return dx_md, tiles.weight_gradient(x_md, dy_mf, group_sizes_e, w_edf.dtype)

    def by_reference(x_md, w_edf, group_sizes_e, dy_mf):
        product = functools.partial(reference.grouped_matmul, group_sizes_e=group_sizes_e)
        return jax.vjp(product, x_md, w_edf)[1](dy_mf)

    gradients = jax.lax.platform_dependent(*residuals, dy_mf, cpu=by_tiles, default=by_reference)
    return *gradients, None


_grouped_matmul.defvjp(_forward, _backward)
