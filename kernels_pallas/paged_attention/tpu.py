"""Paged attention on TPU (Mosaic): prefetches the live pages of each sequence one block ahead.

A program computes one sequence and loops over blocks of keys, with the running maximum and sum of
FlashAttention (arXiv:2205.14135). While it computes a block it fetches the next one; during the
last block, the first block of the next sequence. Pages before the window and past the length are
not fetched.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.varying import shape_like, varying_alike

F32 = jnp.float32
HIDDEN = -1e30
# Most bytes and slots of the keys in a block. Values take as much again; both are double-buffered.
BLOCK_BYTES, BLOCK_SLOTS = 2**20, 1024
LANES = 128
VMEM = 48 * 2**20
# Most entries of all page tables; scalar memory has 1 MiB.
TABLE = 2**17
# Sequences alternate between two parallel grid indices, one for each core of a v5p.
CORES = 2


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
    _, kv_heads, slots, _ = k_pages_pksh.shape
    _check(slots, k_pages_pksh.dtype, table_bp)
    groups = n // kv_heads
    q_bkrh = q_btnh.reshape(b, t, kv_heads, groups, h).swapaxes(1, 2)
    q_bkrh = q_bkrh.reshape(b, kv_heads, t * groups, h)
    if b % CORES:
        q_bkrh, table_bp, lengths_b = (
            jnp.pad(x, [(0, -b % CORES)] + [(0, 0)] * (x.ndim - 1))
            for x in (q_bkrh, table_bp, lengths_b)
        )
    pages = block_pages(k_pages_pksh, table_bp.shape[1])
    span = pages * slots
    arrays = [q_bkrh, k_pages_pksh, v_pages_pksh]
    buffers = [pltpu.VMEM((2, kv_heads, span, h), k_pages_pksh.dtype)] * 2
    if scales is not None:
        arrays += [each.astype(F32) for each in scales]
        buffers += [pltpu.VMEM((2, kv_heads, span), F32)] * 2
    table, lengths, *arrays = varying_alike(table_bp.reshape(-1), lengths_b, *arrays)
    rows = pl.BlockSpec((None, *q_bkrh.shape[1:]), lambda core, i, *_: (i * CORES + core, 0, 0, 0))
    out_bkrh = pl.pallas_call(
        partial(
            _kernel,
            table_width=table_bp.shape[1],
            pages=pages,
            queries=t,
            window=window,
            softcap=softcap,
            scale=scale,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(CORES, q_bkrh.shape[0] // CORES),
            in_specs=[rows, *[pl.BlockSpec(memory_space=pl.ANY)] * (len(arrays) - 1)],
            out_specs=rows,
            scratch_shapes=[
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                *buffers,
            ],
        ),
        out_shape=shape_like(q_bkrh.shape, q_bkrh.dtype, *arrays),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM,
            disable_bounds_checks=True,  # up to half of the instructions; `copies` clips the pages
        ),
        name="paged_attention",
    )(table, lengths, *arrays)
    out = out_bkrh[:b].reshape(b, kv_heads, t, groups, h).swapaxes(1, 2)
    return out.reshape(b, t, n, h)


def block_pages(pages_pksh: jax.Array, table_width: int) -> int:
    """Number of pages in a block."""
    _, kv_heads, slots, h = pages_pksh.shape
    fit = BLOCK_BYTES // (kv_heads * h * pages_pksh.dtype.itemsize)
    return max(1, min(table_width, min(fit, BLOCK_SLOTS) // slots))


def _check(slots, dtype, table_bp) -> None:
    # A page is copied into a block in whole register tiles, its scales in whole rows of lanes.
    least = LANES if dtype.itemsize == 1 else 32 // dtype.itemsize
    if slots % least:
        raise ValueError(
            f"paged_attention on TPU: pages have {slots} slots of {dtype}; "
            f"the number of slots must be a multiple of {least}."
        )
    if table_bp.size > TABLE:
        raise ValueError(
            f"paged_attention on TPU: table_bp {table_bp.shape} has more than {TABLE} entries; "
            "use larger pages or fewer sequences."
        )


def _kernel(table, lengths, q_ref, *refs, table_width, pages, queries, window, softcap, scale):
    sources, (out_ref, state, semaphores), buffers = _split(refs)
    v_buffer = buffers[1]
    core, i, count = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    b = i * CORES + core
    kv_heads, rows, h = q_ref.shape
    slots = sources[0].shape[2]
    span = pages * slots

    def first_key(b):
        if window is None:
            return 0
        return jnp.maximum(lengths[b] - queries + 1 - window, 0)

    def first_block(b):
        return jax.lax.div(first_key(b), span) if window is not None else 0

    def copies(b, block, slot, action):
        """Calls `action`, "start" or "wait", of the copies of a block's live pages."""
        low = jnp.maximum(jax.lax.div(first_key(b), slots), block * pages)
        high = jnp.minimum(jax.lax.div(lengths[b] + slots - 1, slots), (block + 1) * pages)

        def copy(page, _):
            at = pl.ds(pl.multiple_of((page - block * pages) * slots, slots), slots)
            number = jnp.clip(table[b * table_width + page], 0, sources[0].shape[0] - 1)
            for source, buffer in zip(sources, buffers, strict=True):
                place = buffer.at[(slot, slice(None), at)]
                getattr(
                    pltpu.make_async_copy(source.at[number], place, semaphores.at[slot]), action
                )()

        jax.lax.fori_loop(low, high, copy, None)

    @pl.when(i == 0)
    def _():
        state[0] = 0
        copies(b, first_block(b), 0, "start")

    length = lengths[b]
    start = first_block(b)
    blocks = jnp.maximum(jax.lax.div(length + span - 1, span) - start, 1)
    begin = state[0]
    q = q_ref[...]
    index = (
        length
        - queries
        + jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (1, rows, span), 1), rows // queries)
    )

    def step(j, carry):
        slot = (begin + j) & 1
        block = start + j

        @pl.when(j + 1 < blocks)
        def _():
            copies(b, block + 1, 1 - slot, "start")

        @pl.when((j + 1 == blocks) & (i + 1 < count))
        def _():
            copies(b + CORES, first_block(b + CORES), 1 - slot, "start")

        copies(b, block, slot, "wait")
        inside = block * span + jax.lax.broadcasted_iota(jnp.int32, (1, span, h), 1)

        @pl.when((block * span < first_key(b)) | ((block + 1) * span > length))
        def _():
            # Slots that were not fetched or never written may hold NaN, and 0 * NaN is NaN.
            live = (inside >= first_key(b)) & (inside < length)
            values = v_buffer[slot]
            v_buffer[slot] = jnp.where(live, values.astype(F32), 0).astype(values.dtype)

        return _attend(carry, q, buffers, slot, block, index, window, softcap, scale)

    zeros = jnp.zeros((kv_heads, rows, 1), F32)
    carry = zeros + HIDDEN, zeros, jnp.zeros((kv_heads, rows, h), F32)
    _, total, acc = jax.lax.fori_loop(0, blocks, step, carry)
    state[0] = (begin + blocks) & 1
    out_ref[...] = (acc / jnp.where(total == 0, 1, total)).astype(out_ref.dtype)


def _attend(carry, q, buffers, slot, block, index, window, softcap, scale):
    """Adds a block of keys, in buffer `slot`, to the running (top, total, acc)."""
    top, total, acc = carry
    k_buffer, v_buffer, *scale_buffers = buffers
    s = _dot(q, k_buffer[slot].astype(q.dtype), 2) * scale
    if scale_buffers:
        s *= scale_buffers[0][slot][:, None]
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    span = index.shape[2]
    key = block * span + jax.lax.broadcasted_iota(jnp.int32, index.shape, 2)
    visible = key <= index
    if window is not None:
        visible &= index - key < window
    s = jnp.where(visible, s, HIDDEN)
    new_top = jnp.maximum(top, jnp.max(s, axis=2, keepdims=True))
    p = jnp.where(visible, jnp.exp(s - new_top), 0)
    shrink = jnp.exp(top - new_top)
    total = total * shrink + jnp.sum(p, axis=2, keepdims=True)
    if scale_buffers:
        p = jnp.where(visible, p * scale_buffers[1][slot][:, None], 0)
    acc = acc * shrink + _dot(p.astype(q.dtype), v_buffer[slot].astype(q.dtype), 1)
    return new_top, total, acc


def _split(refs):
    """Splits a kernel's refs into (pages and scales; output, state and semaphores; buffers)."""
    arrays = (len(refs) - 3) // 2
    return refs[:arrays], refs[arrays : arrays + 3], refs[arrays + 3 :]


def _dot(a, b, axis):
    """Batched matmul over K of [K, R, x] and b, contracting x with `axis` of b, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == F32 else None
    return jax.lax.dot_general(
        a, b, (((2,), (axis,)), ((0,), (0,))), precision=precision, preferred_element_type=F32
    )
