"""Grouped matmul in plain JAX: the specification, and the implementation on GPU."""

import jax
import jax.numpy as jnp


def grouped_matmul(x_md: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    """See op.py."""
    # Backends leave rows past the last group undefined, in the product and in its gradient.
    inside_m1 = (jnp.arange(x_md.shape[0]) < group_sizes_e.sum())[:, None]
    y_mf = jax.lax.ragged_dot(jnp.where(inside_m1, x_md, 0), w_edf, group_sizes_e)
    return jnp.where(inside_m1, y_mf, 0)


def quantized(
    x_md: jax.Array,
    w_edf: jax.Array,
    group_sizes_e: jax.Array,
    scales_ef: jax.Array,
    transposed: bool = False,
) -> jax.Array:
    """Grouped matmul with int8 weights. `transposed` maps x [M, F] to [M, D], for the gradient."""
    ends_e = jnp.cumsum(group_sizes_e)
    group_m = jnp.searchsorted(ends_e, jnp.arange(x_md.shape[0]), side="right")
    scales_mf = scales_ef.astype(jnp.float32).at[group_m].get(mode="clip")
    w = w_edf.astype(x_md.dtype)
    if transposed:
        x_md = (x_md * scales_mf).astype(x_md.dtype)
        return grouped_matmul(x_md, jnp.swapaxes(w, 1, 2), group_sizes_e)
    return (grouped_matmul(x_md, w, group_sizes_e) * scales_mf).astype(x_md.dtype)
