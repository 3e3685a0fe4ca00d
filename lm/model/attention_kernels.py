"""The attention kernels on one device or a mesh: over whole sequences, and over the pages of a
cache."""

from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec

import kernels_pallas
from lm.model.paged import Pages
from lm.parallel.sharding import context_parallel_size, is_sharded, partition, shard_map


def attend(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    of_heads: dict[str, jax.Array],
    of_tokens: dict[str, jax.Array | None],
    **options: Any,
) -> jax.Array:
    """Runs the attention kernel in a shard_map over batch and heads, since the compiler cannot
    partition a TPU kernel. With context parallelism, uses ring or all-gather attention."""
    n, kv_heads = q_btnh.shape[2], k_bskh.shape[2]
    of_tokens = {name: x for name, x in of_tokens.items() if x is not None}
    attention = kernels_pallas.flash_attention
    if context_parallel_size() > 1:
        stay = partition(k_bskh.shape, "batch", "keys", "kv_heads", "head")[1]
        ring = stay and not options["sink_tokens"]
        form = kernels_pallas.ring_attention if ring else kernels_pallas.gathered_attention
        attention = partial(form, axis_name="context")

    def local(q_btnh, k_bskh, v_bskh, of_heads, of_tokens):
        if k_bskh.shape[2] * n != q_btnh.shape[2] * kv_heads:
            # Fewer key/value heads than devices: they are replicated; take the one that is read.
            first = jax.lax.axis_index(heads) * q_btnh.shape[2] * kv_heads // n
            k_bskh, v_bskh = (
                jax.lax.dynamic_slice_in_dim(x, first, 1, axis=2) for x in (k_bskh, v_bskh)
            )
        return attention(q_btnh, k_bskh, v_bskh, **of_heads, **of_tokens, **options)

    if not is_sharded():
        return local(q_btnh, k_bskh, v_bskh, of_heads, of_tokens)
    q_spec = partition(q_btnh.shape, "batch", "seq", "heads", "head")
    kv_spec = partition(k_bskh.shape, "batch", "seq", "kv_heads", "head")
    heads = q_spec[2]
    in_specs = (
        q_spec,
        kv_spec,
        kv_spec,
        dict.fromkeys(of_heads, PartitionSpec(heads)),
        dict.fromkeys(of_tokens, PartitionSpec(*q_spec[:2])),
    )
    out_spec = (q_spec, PartitionSpec(*q_spec[:3])) if options["return_lse"] else q_spec
    return shard_map(local, in_specs, out_spec)(q_btnh, k_bskh, v_bskh, of_heads, of_tokens)


def attend_pages(
    q_btnh: jax.Array, pages: Pages, of_heads: dict[str, jax.Array], **options: Any
) -> jax.Array:
    """Runs the paged attention kernel, on a mesh in a shard_map over rows and heads. Every device
    holds its heads of all pages."""

    def local(q_btnh, pages, of_heads):
        *arrays, scales = pages
        k_scales, v_scales = scales or (None, None)
        return kernels_pallas.paged_attention(
            q_btnh, *arrays, k_scales_pks=k_scales, v_scales_pks=v_scales, **of_heads, **options
        )

    if not is_sharded():
        return local(q_btnh, pages, of_heads)
    q_spec = partition(q_btnh.shape, "batch", "seq", "heads", "head")
    rows, heads = q_spec[0], q_spec[2]
    page_spec, scales_spec = PartitionSpec(None, heads), None
    if pages.scales is not None:
        scales_spec = (page_spec, page_spec)
    in_specs = (
        q_spec,
        Pages(page_spec, page_spec, PartitionSpec(rows), PartitionSpec(rows), scales_spec),
        dict.fromkeys(of_heads, PartitionSpec(heads)),
    )
    out_spec = (q_spec, PartitionSpec(*q_spec[:3])) if options["return_lse"] else q_spec
    return shard_map(local, in_specs, out_spec)(q_btnh, pages, of_heads)
