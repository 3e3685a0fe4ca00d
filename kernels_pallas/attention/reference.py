"""Attention as einsums: the specification of every other form, with O(T*S) memory."""

import jax
import jax.numpy as jnp


def attention(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    sink_tokens: int = 0,
    segments_bt: jax.Array | None = None,
    kv_segments_bs: jax.Array | None = None,
    positions_bt: jax.Array | None = None,
    softcap: float | None = None,
    sinks_n: jax.Array | None = None,
    alibi_n: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """out_btnh; the arguments are those of `kernels_pallas.attention`."""
    b, t, n, h = q_btnh.shape
    s, k = k_bskh.shape[1:3]
    if positions_bt is None:
        positions_bt = jnp.broadcast_to(jnp.arange(t), (b, t))
    if kv_segments_bs is None:
        kv_segments_bs = segments_bt

    q_btkgh = q_btnh.astype(jnp.float32).reshape(b, t, k, n // k, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_btkgh, k_bskh.astype(jnp.float32))
    scores_bnts = scores.reshape(b, n, t, s) * (h**-0.5 if scale is None else scale)
    if softcap is not None:
        scores_bnts = softcap * jnp.tanh(scores_bnts / softcap)

    distance_bts = positions_bt[:, :, None] - jnp.arange(s)
    if alibi_n is not None:
        scores_bnts -= alibi_n.astype(jnp.float32)[:, None, None] * distance_bts[:, None]
    visible_bts = jnp.ones((b, t, s), bool)
    if causal:
        visible_bts &= distance_bts >= 0
    if window is not None:
        visible_bts &= (distance_bts < window) | (jnp.arange(s) < sink_tokens)
    if segments_bt is not None:
        visible_bts &= segments_bt[:, :, None] == kv_segments_bs[:, None, :]
    scores_bnts = jnp.where(visible_bts[:, None], scores_bnts, -jnp.inf)

    # A row that sees nothing has weights 0, not 0/0.
    largest = jnp.max(scores_bnts, axis=-1, keepdims=True)
    if sinks_n is not None:
        sinks = sinks_n.astype(jnp.float32)[:, None, None]
        largest = jnp.maximum(largest, sinks)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0))
    weights_bnts = jnp.exp(scores_bnts - largest)
    total = jnp.sum(weights_bnts, axis=-1, keepdims=True)
    if sinks_n is not None:
        total += jnp.exp(sinks - largest)
    weights_bkgts = (weights_bnts / jnp.where(total == 0, 1, total)).reshape(b, k, n // k, t, s)
    out = jnp.einsum("bkgts,bskh->btkgh", weights_bkgts, v_bskh.astype(jnp.float32))
    return out.reshape(b, t, n, v_bskh.shape[-1]).astype(q_btnh.dtype)
