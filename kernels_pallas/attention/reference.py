"""Attention in einsums: the specification of all other implementations. Takes O(T*S) memory."""

import jax
import jax.numpy as jnp

# Log-sum-exp of a row without visible keys. Finite, so that differences are 0 instead of NaN.
HIDDEN = -1e30


def flash_attention(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    sink_tokens: int = 0,
    prefix: int | jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_btnh, lse_btn). Arguments as in `kernels_pallas.flash_attention`."""
    b, t, n, h = q_btnh.shape
    s, k = k_bskh.shape[1:3]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    if kv_segment_ids is None:
        kv_segment_ids = segment_ids

    q_btkgh = q_btnh.astype(jnp.float32).reshape(b, t, k, n // k, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_btkgh, k_bskh.astype(jnp.float32))
    scores_bnts = scores.reshape(b, n, t, s) * (h**-0.5 if scale is None else scale)
    if softcap is not None:
        scores_bnts = softcap * jnp.tanh(scores_bnts / softcap)

    distance_bts = positions[:, :, None] - jnp.arange(s)
    if alibi is not None:
        scores_bnts -= alibi.astype(jnp.float32)[:, None, None] * distance_bts[:, None]
    ranks_bs = jnp.broadcast_to(jnp.arange(s), (b, s))
    if kv_segment_ids is not None:
        ranks_bs = ranks_in_documents(kv_segment_ids)
    visible_bts = jnp.ones((b, t, s), bool)
    if causal:
        visible_bts &= distance_bts >= 0
    if window is not None:
        visible_bts &= (distance_bts < window) | (ranks_bs < sink_tokens)[:, None]
    if prefix is not None:
        visible_bts |= (ranks_bs < jnp.broadcast_to(prefix, (b,))[:, None])[:, None]
    if segment_ids is not None:
        visible_bts &= segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    scores_bnts = jnp.where(visible_bts[:, None], scores_bnts, -jnp.inf)

    # Rows without visible keys get weights 0 instead of 0/0.
    largest = jnp.max(scores_bnts, axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32)[:, None, None]
        largest = jnp.maximum(largest, sinks)
    seen = jnp.isfinite(largest)
    largest = jax.lax.stop_gradient(jnp.where(seen, largest, 0))
    weights_bnts = jnp.exp(scores_bnts - largest)
    total = jnp.sum(weights_bnts, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - largest)
    total = jnp.where(seen, total, 1)
    weights_bkgts = (weights_bnts / total).reshape(b, k, n // k, t, s)
    out = jnp.einsum("bkgts,bskh->btkgh", weights_bkgts, v_bskh.astype(jnp.float32))
    lse_bnt = jnp.where(seen, largest + jnp.log(total), HIDDEN)[..., 0]
    out_btnh = out.reshape(b, t, n, v_bskh.shape[-1]).astype(q_btnh.dtype)
    return out_btnh, jnp.swapaxes(lse_bnt, 1, 2)


def ranks_in_documents(segments_bs: jax.Array) -> jax.Array:
    """Index of each key in its run of equal segment ids, [B, S]."""
    places = jnp.arange(segments_bs.shape[1])
    starts = jnp.diff(segments_bs, axis=1, prepend=segments_bs[:, :1]) != 0
    return places - jax.lax.cummax(jnp.where(starts, places, 0), axis=1)
