"""Public grouped matmul: checks the arguments and selects the implementation."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import announce, on_platform
from kernels_pallas.grouped_matmul import reference, tiles, tpu
from kernels_pallas.varying import varying_alike


def grouped_matmul(
    x_md: jax.Array,
    w_edf: jax.Array,
    group_sizes_e: jax.Array,
    *,
    scales_ef: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """y[m] = x[m] @ w[group of m]. The first group_sizes[0] rows are group 0, and so on.

    On several devices call it inside `jax.shard_map`: XLA does not shard a kernel automatically.

    Args:
      x_md: [M, D] rows, sorted by group.
      w_edf: [E, D, F] one matrix per group, in x's dtype, or int8 with `scales_ef`.
      group_sizes_e: [E] integers >= 0, with a sum of at most M. Rows past the sum give zeros and
        get no gradient.
      scales_ef: [E, F] scale of each column of an int8 w. Then only x gets a gradient.
      implementation: "tpu" or "reference"; None selects the platform's.

    Returns:
      [M, F] in x's dtype, summed in float32 on TPU.

    Raises:
      ValueError: shapes or dtypes do not fit together.
    """
    _check(x_md, w_edf, group_sizes_e, scales_ef)
    announce("grouped_matmul", implementation, gpu="ragged_dot", others="plain JAX in tiles")
    if scales_ef is None:
        return _grouped_matmul(implementation, *varying_alike(x_md, w_edf, group_sizes_e))
    arrays = varying_alike(x_md, w_edf, group_sizes_e, jax.lax.stop_gradient(scales_ef))
    return _quantized(implementation, *arrays)


def _check(x_md, w_edf, group_sizes_e, scales_ef) -> None:
    if x_md.ndim != 2 or w_edf.ndim != 3 or group_sizes_e.ndim != 1:
        raise ValueError(
            "grouped_matmul takes x [M, D], w [E, D, F] and group_sizes [E], "
            f"not {x_md.shape}, {w_edf.shape} and {group_sizes_e.shape}."
        )
    if x_md.shape[1] != w_edf.shape[1]:
        raise ValueError(
            f"grouped_matmul: x has width {x_md.shape[1]} but w has input width {w_edf.shape[1]}."
        )
    if w_edf.shape[0] != group_sizes_e.shape[0]:
        raise ValueError(
            f"grouped_matmul: w has {w_edf.shape[0]} groups "
            f"but group_sizes has {group_sizes_e.shape[0]}."
        )
    if not jnp.issubdtype(group_sizes_e.dtype, jnp.integer):
        raise ValueError(
            f"grouped_matmul: group_sizes must be integers, not {group_sizes_e.dtype}."
        )
    if scales_ef is None:
        if x_md.dtype != w_edf.dtype:
            raise ValueError(f"grouped_matmul: x is {x_md.dtype} but w is {w_edf.dtype}.")
        return
    if w_edf.dtype != jnp.int8:
        raise ValueError(f"grouped_matmul: scales_ef needs a w of int8, not {w_edf.dtype}.")
    if scales_ef.shape != (w_edf.shape[0], w_edf.shape[2]):
        raise ValueError(
            f"grouped_matmul: scales_ef has shape {scales_ef.shape}; it needs one scale per column "
            f"of each matrix, {(w_edf.shape[0], w_edf.shape[2])}."
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(implementation, x_md, w_edf, group_sizes_e):
    return on_platform(
        implementation,
        x_md,
        w_edf,
        group_sizes_e,
        cpu=tiles.product,
        tpu=tpu.product,
        reference=reference.grouped_matmul,
    )


def _forward(implementation, x_md, w_edf, group_sizes_e):
    y_mf = _grouped_matmul(implementation, x_md, w_edf, group_sizes_e)
    return y_mf, (x_md, w_edf, group_sizes_e)


def _backward(implementation, residuals, dy_mf):
    def by(form):
        def gradients(x_md, w_edf, group_sizes_e, dy_mf):
            dx_md = form.product(dy_mf, w_edf, group_sizes_e, transposed=True)
            return dx_md, form.weight_gradient(x_md, dy_mf, group_sizes_e, w_edf.dtype)

        return gradients

    def by_reference(x_md, w_edf, group_sizes_e, dy_mf):
        product = partial(reference.grouped_matmul, group_sizes_e=group_sizes_e)
        return jax.vjp(product, x_md, w_edf)[1](dy_mf)

    gradients = on_platform(
        implementation,
        *residuals,
        dy_mf,
        cpu=by(tiles),
        tpu=by(tpu),
        reference=by_reference,
    )
    return *gradients, None


_grouped_matmul.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantized(implementation, x_md, w_edf, group_sizes_e, scales_ef):
    return on_platform(
        implementation,
        x_md,
        w_edf,
        group_sizes_e,
        scales_ef,
        tpu=tpu.product,
        reference=reference.quantized,
    )


def _quantized_forward(implementation, x_md, *rest):
    return _quantized(implementation, x_md, *rest), rest


def _quantized_backward(implementation, rest, dy_mf):
    dx_md = on_platform(
        implementation,
        dy_mf,
        *rest,
        tpu=partial(tpu.product, transposed=True),
        reference=partial(reference.quantized, transposed=True),
    )
    return dx_md, None, None, None


_quantized.defvjp(_quantized_forward, _quantized_backward)
