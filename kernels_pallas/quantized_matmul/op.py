"""Public quantized matmuls: check the arguments and select the implementation."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import announce, on_platform
from kernels_pallas.quantized_matmul import reference, tpu
from kernels_pallas.quantized_matmul.packing import Packed, unpack
from kernels_pallas.varying import varying_alike


def int8_matmul(
    x_md: jax.Array, w_df: jax.Array, scales_f: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """x @ (w * scales) with both operands in int8. Each row of x is scaled and rounded (LLM.int8,
    arXiv:2208.07339, without outlier handling); the integer sum is exact.

    On several devices call it inside `jax.shard_map`.

    Args:
      x_md: [M, D] bfloat16 or float32.
      w_df: [D, F] int8, as from `quantize_int8`.
      scales_f: [F] scale of each column of w.
      implementation: "tpu" or "reference"; None selects the platform's.

    Returns:
      [M, F] in x's dtype. Only x gets a gradient, that of x @ (w * scales).

    Raises:
      ValueError: shapes or dtypes do not fit together.
    """
    if x_md.ndim != 2 or w_df.ndim != 2 or x_md.shape[1] != w_df.shape[0]:
        raise ValueError(f"x_md {x_md.shape} and w_df {w_df.shape} must share the width D.")
    if w_df.dtype != jnp.int8 or scales_f.shape != w_df.shape[1:]:
        raise ValueError(
            f"w_df is {w_df.dtype} and scales_f {scales_f.shape}; w_df must be int8, with a scale "
            f"for each of its {w_df.shape[1]} columns."
        )
    _check_activations(x_md)
    announce("int8_matmul", implementation)
    return _int8(implementation, *varying_alike(x_md, w_df, scales_f))


def packed_matmul(
    x_md: jax.Array, packed: Packed, *, implementation: str | None = None
) -> jax.Array:
    """x @ w for weights of 4 or 3 bits from `pack`. On several devices call it inside
    `jax.shard_map`.

    Args:
      x_md: [M, D] bfloat16 or float32.
      packed: weights of shape [D, F].
      implementation: "tpu" or "reference"; None selects the platform's.

    Returns:
      [M, F] in x's dtype, summed in float32. Only x gets a gradient.

    Raises:
      ValueError: shapes or dtypes do not fit together.
    """
    if x_md.ndim != 2 or x_md.shape[1] != packed.shape[0]:
        raise ValueError(f"x_md {x_md.shape} and packed weights {packed.shape} must share D.")
    _check_activations(x_md)
    announce("packed_matmul", implementation)
    leaves, tree = jax.tree.flatten((x_md, packed))
    return _packed(implementation, *tree.unflatten(varying_alike(*leaves)))


def _check_activations(x_md) -> None:
    if x_md.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x_md is {x_md.dtype}; it needs bfloat16 or float32.")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _int8(implementation, x_md, w_df, scales_f):
    return on_platform(
        implementation,
        *(x_md, w_df, scales_f),
        tpu=tpu.int8_matmul,
        reference=reference.int8_matmul,
    )


def _int8_forward(implementation, x_md, w_df, scales_f):
    return _int8(implementation, x_md, w_df, scales_f), (w_df, scales_f)


def _int8_backward(_, residuals, dy_mf):
    w_df, scales_f = residuals
    return _times(dy_mf, (w_df * scales_f).T), None, None


_int8.defvjp(_int8_forward, _int8_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(implementation, x_md, packed):
    return on_platform(
        implementation,
        *(x_md, packed),
        tpu=tpu.packed_matmul,
        reference=reference.packed_matmul,
    )


def _packed_forward(implementation, x_md, packed):
    return _packed(implementation, x_md, packed), packed


def _packed_backward(_, packed, dy_mf):
    return _times(dy_mf, unpack(packed).T), None


_packed.defvjp(_packed_forward, _packed_backward)


def _times(dy_mf, w_fd):
    product = jnp.dot(dy_mf, w_fd.astype(dy_mf.dtype), preferred_element_type=jnp.float32)
    return product.astype(dy_mf.dtype)
