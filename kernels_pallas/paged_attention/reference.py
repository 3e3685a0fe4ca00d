"""Paged attention in plain JAX, by gathering all pages of each sequence: the specification."""

import jax
import jax.numpy as jnp

F32 = jnp.float32
HIDDEN = -1e30


def paged_attention(
    q_btnh: jax.Array,
    k_pages_pksh: jax.Array,
    v_pages_pksh: jax.Array,
    table_bp: jax.Array,
    lengths_b: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None,
    of_heads: dict[str, jax.Array],
    *,
    window: int | None,
    sink_tokens: int,
    softcap: float | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_btnh, lse_btn); see op.py. `scales` are (k_scales_pks, v_scales_pks); `of_heads`
    may hold "sinks" and "alibi" [N]."""
    b, t, n, h = q_btnh.shape
    kv_heads = k_pages_pksh.shape[1]
    pages = k_pages_pksh, v_pages_pksh
    if scales is None:
        pages = (x.astype(q_btnh.dtype) for x in pages)
    k_bksh, v_bksh = (_gather(x, table_bp) for x in pages)
    if scales is not None:
        k_scale, v_scale = (_gather(each[..., None], table_bp) for each in scales)
        k_bksh, v_bksh = k_bksh * k_scale, v_bksh * v_scale
    key_s = jnp.arange(k_bksh.shape[2])
    # Slots past the length may hold anything, NaN included.
    filled = (key_s < lengths_b[:, None])[:, None, :, None]
    k_bksh, v_bksh = jnp.where(filled, k_bksh, 0), jnp.where(filled, v_bksh, 0)
    index_bt = lengths_b[:, None] - t + jnp.arange(t)
    distance_bts = index_bt[..., None] - key_s
    visible = distance_bts >= 0
    if window is not None:
        visible &= (distance_bts < window) | (key_s < sink_tokens)
    visible = visible[:, None, None]
    q_btkgh = q_btnh.astype(F32).reshape(b, t, kv_heads, n // kv_heads, h)
    s = jnp.einsum("btkgh,bksh->bkgts", q_btkgh, k_bksh, precision="highest") * scale
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    if "alibi" in of_heads:
        slopes_kg = of_heads["alibi"].astype(F32).reshape(kv_heads, -1)
        s -= slopes_kg[..., None, None] * distance_bts[:, None, None]
    lse = jax.nn.logsumexp(s, axis=-1, keepdims=True, where=visible)
    if "sinks" in of_heads:
        sinks_kg = of_heads["sinks"].astype(F32).reshape(kv_heads, -1)
        lse = jnp.logaddexp(lse, sinks_kg[..., None, None])
    seen = jnp.isfinite(lse)
    p = jnp.where(visible & seen, jnp.exp(s - jnp.where(seen, lse, 0)), 0)
    out = jnp.einsum("bkgts,bksh->btkgh", p, v_bksh, precision="highest")
    lse_btn = jnp.einsum("bkgt->btkg", jnp.where(seen, lse, HIDDEN)[..., 0]).reshape(b, t, n)
    return out.reshape(b, t, n, h).astype(q_btnh.dtype), lse_btn


def _gather(pages_pksh, table_bp):
    """[P, K, S, H] -> [B, K, all slots of the sequence, H] in float32."""
    x = jnp.moveaxis(pages_pksh[table_bp].astype(F32), 2, 1)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])
