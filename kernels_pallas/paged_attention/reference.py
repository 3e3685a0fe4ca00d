"""Paged attention in plain JAX, by gathering all pages of each sequence: the specification, and the
implementation on CPU and GPU."""

import jax
import jax.numpy as jnp

F32 = jnp.float32


def paged_attention(
    q_btnh: jax.Array,
    k_pages_pksh: jax.Array,
    v_pages_pksh: jax.Array,
    table_bp: jax.Array,
    lengths_b: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> jax.Array:
    """Returns out_btnh; see op.py. `scales` are (k_scales_pks, v_scales_pks)."""
    b, t, n, h = q_btnh.shape
    kv_heads = k_pages_pksh.shape[1]
    k_bksh, v_bksh = (_gather(pages, table_bp) for pages in (k_pages_pksh, v_pages_pksh))
    if scales is not None:
        k_scale, v_scale = (_gather(each[..., None], table_bp) for each in scales)
        k_bksh, v_bksh = k_bksh * k_scale, v_bksh * v_scale
    key_s = jnp.arange(k_bksh.shape[2])
    # Slots past the length may hold anything, NaN included.
    filled = (key_s < lengths_b[:, None])[:, None, :, None]
    k_bksh, v_bksh = jnp.where(filled, k_bksh, 0), jnp.where(filled, v_bksh, 0)
    index_bt = lengths_b[:, None] - t + jnp.arange(t)
    visible = key_s <= index_bt[..., None]
    if window is not None:
        visible &= index_bt[..., None] - key_s < window
    visible = visible[:, None, None]
    q_btkgh = q_btnh.astype(F32).reshape(b, t, kv_heads, n // kv_heads, h)
    s = jnp.einsum("btkgh,bksh->bkgts", q_btkgh, k_bksh, precision="highest") * scale
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    p = jax.nn.softmax(jnp.where(visible, s, -jnp.inf), axis=-1, where=visible)
    p = jnp.where(visible, p, 0)
    out = jnp.einsum("bkgts,bksh->btkgh", p, v_bksh, precision="highest")
    return out.reshape(b, t, n, h).astype(q_btnh.dtype)


def _gather(pages_pksh, table_bp):
    """[P, K, S, H] -> [B, K, all slots of the sequence, H] in float32."""
    x = jnp.moveaxis(pages_pksh[table_bp].astype(F32), 2, 1)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])
