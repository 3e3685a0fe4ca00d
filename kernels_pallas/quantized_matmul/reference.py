"""Quantized matmuls in plain JAX: the specification, and the implementation on CPU and GPU."""

import jax
import jax.numpy as jnp

from kernels_pallas.quantized_matmul.packing import Packed, unpack

F32 = jnp.float32


def quantize_rows(x_md: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantizes activations to (int8 [M, D], float32 scales [M, 1])."""
    top_m1 = jnp.max(jnp.abs(x_md.astype(F32)), axis=1, keepdims=True)
    scales_m1 = jnp.where(top_m1 > 0, top_m1, 1) / 127
    return jnp.round(x_md.astype(F32) / scales_m1).astype(jnp.int8), scales_m1


def int8_matmul(x_md: jax.Array, w_df: jax.Array, scales_f: jax.Array) -> jax.Array:
    """See op.py."""
    q_md, scales_m1 = quantize_rows(x_md)
    y_mf = jax.lax.dot_general(
        q_md, w_df, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
    )
    return (y_mf.astype(F32) * scales_m1 * scales_f).astype(x_md.dtype)


def packed_matmul(x_md: jax.Array, packed: Packed) -> jax.Array:
    """See op.py."""
    return jnp.dot(x_md.astype(F32), unpack(packed)).astype(x_md.dtype)
