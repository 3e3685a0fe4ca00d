"""Paged attention in plain JAX, a page of each sequence at a time: the implementation on CPU and
GPU, and of the options that the TPU kernel does not have.

It keeps the running maximum and sum of FlashAttention (arXiv:2205.14135). A sequence passes through
its own pages in order, whatever the others in the batch are; pages past its end change nothing, bit
for bit.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.varying import varying_alike

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
    """Returns (out_btnh, lse_btn); see op.py. `of_heads` may hold "sinks" and "alibi" [N]."""
    b, t, n, h = q_btnh.shape
    _, kv_heads, slots, _ = k_pages_pksh.shape
    groups = n // kv_heads

    def by_head(x_n: jax.Array) -> jax.Array:
        """[N] -> [K, G T, 1], as the rows of queries."""
        return jnp.repeat(x_n.astype(F32).reshape(kv_heads, groups), t, axis=1)[..., None]

    q_bkrh = jnp.einsum("btkgh->bkgth", q_btnh.astype(F32).reshape(b, t, kv_heads, groups, h))
    q_bkrh = q_bkrh.reshape(b, kv_heads, groups * t, h)
    index_bt = lengths_b[:, None] - t + jnp.arange(t)
    index_b1r1 = jnp.tile(index_bt, (1, groups))[:, None, :, None]
    sink_pages, first_b, count_b = _live(lengths_b, t, slots, window, sink_tokens)

    def page(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, acc = carry
        place_b = jnp.where(j < sink_pages, j, first_b + j - sink_pages)
        number_b = jnp.take_along_axis(table_bp, place_b[:, None], axis=1, mode="clip")[:, 0]
        k_bksh, v_bksh = (x[number_b] for x in (k_pages_pksh, v_pages_pksh))
        if scales is None:
            k_bksh, v_bksh = (x.astype(q_btnh.dtype) for x in (k_bksh, v_bksh))
        k_bksh, v_bksh = k_bksh.astype(F32), v_bksh.astype(F32)
        if scales is not None:
            k_scale, v_scale = (x[number_b].astype(F32)[..., None] for x in scales)
            k_bksh, v_bksh = k_bksh * k_scale, v_bksh * v_scale
        key_b11s = (place_b[:, None] * slots + jnp.arange(slots))[:, None, None]
        distance = index_b1r1 - key_b11s
        visible = (distance >= 0) & (j < count_b)[:, None, None, None]
        if window is not None:
            visible &= (distance < window) | (key_b11s < sink_tokens)
        s = jnp.einsum("bkrh,bksh->bkrs", q_bkrh, k_bksh, precision="highest") * scale
        if softcap is not None:
            s = softcap * jnp.tanh(s / softcap)
        if "alibi" in of_heads:
            s -= by_head(of_heads["alibi"]) * distance
        s = jnp.where(visible, s, HIDDEN)
        new_top = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
        p = jnp.where(visible, jnp.exp(s - new_top), 0)
        shrink = jnp.exp(top - new_top)
        # Slots past the end may hold anything, NaN included, and 0 * NaN is NaN.
        live_b1s1 = (key_b11s < lengths_b[:, None, None, None]).swapaxes(2, 3)
        v_bksh = jnp.where(live_b1s1, v_bksh, 0)
        more = jnp.einsum("bkrs,bksh->bkrh", p, v_bksh, precision="highest")
        # A product, since XLA on CPUs orders the terms of a plain sum by the size of the batch.
        added = jnp.einsum("bkrs,bksx->bkrx", p, ones_bks1, precision="highest")
        return new_top, total * shrink + added, acc * shrink + more

    zeros = jnp.zeros((b, kv_heads, groups * t, 1), F32)
    ones_bks1 = jnp.ones((b, kv_heads, slots, 1), F32)
    start = zeros + HIDDEN, zeros, jnp.zeros((b, kv_heads, groups * t, h), F32)
    start = tuple(varying_alike(*start, q_bkrh, k_pages_pksh, table_bp, lengths_b)[:3])
    top, total, acc = jax.lax.fori_loop(0, jnp.max(count_b), page, start)
    if "sinks" in of_heads:
        sinks = by_head(of_heads["sinks"])
        new_top = jnp.maximum(top, sinks)
        shrink = jnp.exp(top - new_top)
        top, total, acc = new_top, total * shrink + jnp.exp(sinks - new_top), acc * shrink
    seen = total > 0
    total = jnp.where(seen, total, 1)
    lse = jnp.where(seen, top + jnp.log(total), HIDDEN)

    def rows(x: jax.Array) -> jax.Array:
        x = x.reshape(b, kv_heads, groups, t, x.shape[-1])
        return jnp.einsum("bkgth->btkgh", x).reshape(b, t, n, x.shape[-1])

    return rows(acc / total).astype(q_btnh.dtype), rows(lse)[..., 0]


def _live(
    lengths_b: jax.Array, queries: int, slots: int, window: int | None, sink_tokens: int
) -> tuple[int, jax.Array, jax.Array]:
    """(pages of sink tokens, first page [B] of the others, pages [B] to read in all)."""
    end_b = (lengths_b + slots - 1) // slots
    if window is None:
        return 0, jnp.zeros_like(lengths_b), end_b
    sink_pages = -(-sink_tokens // slots)
    first_key_b = jnp.maximum(lengths_b - queries + 1 - window, 0)
    first_b = jnp.maximum(first_key_b // slots, sink_pages)
    return sink_pages, first_b, sink_pages + jnp.maximum(end_b - first_b, 0)
