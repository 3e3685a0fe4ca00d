"""Flash attention on TPU: lays out arrays for the two Mosaic kernels and converts the results."""

import math

import jax
import jax.numpy as jnp

from kernels_pallas.attention import tpu_backward, tpu_forward
from kernels_pallas.attention.blocked import Extras, Options
from kernels_pallas.attention.blocks import Sizes, backward_sizes, forward_sizes
from kernels_pallas.attention.reference import HIDDEN
from kernels_pallas.attention.tpu_mask import masks_of, pad

F32 = jnp.float32
LOG2E = math.log2(math.e)
# If the base-2 scores are provably at most this, the softmax subtracts no maximum: float32 holds
# 2**126, and so sums of such weights over a million keys.
BOUND = 80.0
# Blocks of wider heads do not fit into vector memory.
MOST_WIDTH = 256


def unsupported(q_btnh, k_bskh, v_bskh, extras: Extras) -> str | None:
    """Names the first thing that the kernels do not support, for a message; None if nothing."""
    if extras.alibi_n is not None:
        return "alibi"
    if not q_btnh.dtype == k_bskh.dtype == v_bskh.dtype:
        return f"queries in {q_btnh.dtype} with keys in {k_bskh.dtype}, values in {v_bskh.dtype}"
    if q_btnh.dtype not in (jnp.bfloat16, jnp.float32):
        return str(q_btnh.dtype)
    if _width(q_btnh, v_bskh) > MOST_WIDTH:
        return f"heads wider than {MOST_WIDTH}"
    return None


def forward(q_btnh, k_bskh, v_bskh, extras: Extras, *, options: Options):
    """Returns (out_btnh, lse_bkgt)."""
    t, s = q_btnh.shape[1], k_bskh.shape[1]
    groups = q_btnh.shape[2] // k_bskh.shape[2]
    sizes = forward_sizes(t, s, groups, _width(q_btnh, v_bskh), q_btnh.dtype)
    q, k, v, masks = _laid_out(q_btnh, k_bskh, v_bskh, extras, options, sizes)
    sinks = None if extras.sinks_n is None else extras.sinks_n.astype(F32) * LOG2E
    bounded = _bounded(q, k, sinks, options)
    out, lse = tpu_forward.call(q, k, v, masks, sinks, bounded, options, sizes)
    lse = _from_blocks(lse, sizes, groups)[..., :t]
    return _ungroup(out, t), lse


def backward(q_btnh, k_bskh, v_bskh, extras, out_btnh, lse_bkgt, dout_btnh, dlse_bkgt, *, options):
    """Returns (dq_btnh, dk_bskh, dv_bskh, dsinks_n or None, None); alibi is not supported."""
    b, t, n, _ = q_btnh.shape
    s, kv_heads = k_bskh.shape[1:3]
    groups = n // kv_heads
    sizes = backward_sizes(t, s, groups, _width(q_btnh, v_bskh), q_btnh.dtype)
    delta_btn = jnp.sum(dout_btnh.astype(F32) * out_btnh.astype(F32), axis=-1)
    # d lse / d score is the weight p, as in the softmax, so both gradients are one difference.
    delta = jnp.moveaxis(delta_btn.reshape(b, t, kv_heads, groups), 1, 3) - dlse_bkgt
    dsinks_n = None
    if extras.sinks_n is not None:
        weight = jnp.exp(extras.sinks_n.astype(F32).reshape(kv_heads, groups, 1) - lse_bkgt)
        dsinks_n = -jnp.sum(weight * delta, axis=(0, 3)).reshape(n).astype(extras.sinks_n.dtype)
    q, k, v, masks = _laid_out(q_btnh, k_bskh, v_bskh, extras, options, sizes)
    dout = _by_group(dout_btnh, kv_heads, sizes.rows)
    # Padding rows get weights exp2(0 - 1e30) = 0.
    lse = _to_blocks(lse_bkgt * LOG2E, sizes, -HIDDEN)
    delta = _to_blocks(delta, sizes, 0)
    dq, dk, dv = tpu_backward.call(q, k, v, dout, lse, delta, masks, options, sizes)
    dk, dv = (jnp.swapaxes(x, 1, 2)[:, :s] for x in (dk, dv))
    return _ungroup(dq, t).astype(q_btnh.dtype), dk, dv, dsinks_n, None


def _width(q_btnh, v_bskh):
    return max(q_btnh.shape[-1], v_bskh.shape[-1])


def _laid_out(q_btnh, k_bskh, v_bskh, extras, options, sizes):
    """(q_bkgth, k_bksh, v_bksh, Masks), padded to whole blocks."""
    t, s, kv_heads = q_btnh.shape[1], *k_bskh.shape[1:3]
    q = _by_group(q_btnh, kv_heads, sizes.rows)
    k, v = (pad(jnp.swapaxes(x, 1, 2), 2, sizes.block) for x in (k_bskh, v_bskh))
    return q, k, v, masks_of(options, extras, q.shape[0], t, s, sizes)


def _bounded(q, k, sinks, options) -> jax.Array:
    """[B * K] int32: 1 where no score can exceed BOUND, by the product of the largest norms of q
    and k (Cauchy-Schwarz)."""
    norms = [jnp.sum(jnp.square(x.astype(F32)), -1) for x in (q, k)]
    largest = jnp.sqrt(jnp.max(norms[0], (2, 3)) * jnp.max(norms[1], 2))
    bound_bk = largest * (abs(options.scale) * LOG2E)
    if options.softcap is not None:
        bound_bk = jnp.minimum(bound_bk, options.softcap * LOG2E)
    if sinks is not None:
        bound_bk = jnp.maximum(bound_bk, jnp.max(jnp.abs(sinks)))
    return (bound_bk <= BOUND).astype(jnp.int32).reshape(-1)


def _by_group(x_btnh, kv_heads, rows):
    """[B, T, N, H] -> [B, K, G, T padded to a multiple of rows, H]."""
    b, t, n, h = x_btnh.shape
    x = jnp.transpose(x_btnh.reshape(b, t, kv_heads, n // kv_heads, h), (0, 2, 3, 1, 4))
    return pad(x, 3, rows)


def _ungroup(x_bkgth, t):
    b, k, g, _, h = x_bkgth.shape
    return jnp.transpose(x_bkgth[:, :, :, :t], (0, 3, 1, 2, 4)).reshape(b, t, k * g, h)


def _to_blocks(x_bkgt: jax.Array, sizes: Sizes, fill: float) -> jax.Array:
    """[B, K, G, T] -> [B, K, G // heads, blocks, 1, heads * rows]."""
    x = pad(x_bkgt, 3, sizes.rows, fill)
    b, k, g, t = x.shape
    x = x.reshape(b, k, g // sizes.heads, sizes.heads, t // sizes.rows, sizes.rows)
    return jnp.swapaxes(x, 3, 4).reshape(*x.shape[:3], t // sizes.rows, 1, -1)


def _from_blocks(x: jax.Array, sizes: Sizes, groups: int) -> jax.Array:
    """Inverse of `_to_blocks`; keeps the padding."""
    b, k, splits, blocks = x.shape[:4]
    x = x.reshape(b, k, splits, blocks, sizes.heads, sizes.rows)
    return jnp.swapaxes(x, 3, 4).reshape(b, k, groups, blocks * sizes.rows)
