"""The forward kernel for TPU (Mosaic).

A block of queries of all heads of a group meets the keys chunk by chunk. Scores are in powers of
two, their scale folded into the queries. The softmax is exact however it keeps its numbers in
range:

- Where `bounded` says that no score is large, weights are exp2(score).
- Elsewhere one chunk is met with its maximum taken off, and the others with the same number, for
  any near the largest score will do: if no sum of weights then exceeds LARGEST, no weight did.
- If one does, the key block is met once more, now with a running maximum (Milakov and Gimelshein,
  arXiv:1805.02867).

Sums of weights stay spread over the lanes until the last chunk.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import tpu_mask
from kernels_pallas.attention.reference import HIDDEN
from kernels_pallas.attention.tpu_mask import LANES, dot

F32 = jnp.float32
LOG2E = math.log2(math.e)
# How the largest score is taken off: that of the chunks so far, or of an earlier one.
RUNNING, FIXED = "running", "fixed"
# Sums of weights up to here have lost nothing in float32, which ends at 2**128.
LARGEST = 2.0**100


def call(q, k, v, masks, sinks, bounded, options, sizes) -> tuple[jax.Array, jax.Array]:
    """(out_bkgth, lse[B, K, G // heads, blocks, 1, rows of a block up to lanes])."""
    b, kv_heads, groups, t, h = q.shape
    s, hv = k.shape[2], v.shape[3]
    splits, blocks, spans = groups // sizes.heads, t // sizes.rows, s // sizes.block
    chunks = sizes.block // sizes.narrow
    rows = sizes.heads * sizes.rows

    def of_queries(*tail):
        shape = (1, 1, sizes.heads, sizes.rows, *tail)
        return pl.BlockSpec(shape, lambda b, k, g, i, j, *_: (b, k, g, i, 0))

    def of_keys(width):
        def index(b, k, g, i, j, table, *_):
            row = tpu_mask.row_of(table, masks, b, i, blocks)
            return b, k, tpu_mask.nearest_block(row, j, chunks), 0

        return pl.BlockSpec((1, 1, sizes.block, width), index)

    def ids_of_keys(b, k, g, i, j, table, *_):
        row = tpu_mask.row_of(table, masks, b, i, blocks)
        return b, tpu_mask.nearest_block(row, j, chunks), 0, 0

    q_ids = pl.BlockSpec(
        (1, 1, 1, -(-sizes.rows // LANES) * LANES), lambda b, k, g, i, j, *_: (b, i, 0, 0)
    )
    k_ids = pl.BlockSpec((1, chunks, 1, sizes.narrow), ids_of_keys)
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    extras = {
        "sinks": (sinks, scalars),
        "prefix": (masks.prefix_b, scalars),
        "q_segments": (masks.q_segments, q_ids),
        "positions": (masks.positions, q_ids),
        "k_segments": (masks.k_segments, k_ids),
        "ranks": (masks.ranks, k_ids),
    }
    extras = {name: pair for name, pair in extras.items() if pair[0] is not None}
    varies = {"manual_axis_type": jax.typeof(q).manual_axis_type}
    kernel = partial(_kernel, tuple(extras), masks, options, sizes, (blocks, spans))
    sums = [pltpu.VMEM(shape, F32) for shape in ((hv, rows), (1, rows), (8, rows))]
    return pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((*q.shape[:4], hv), q.dtype, **varies),
            jax.ShapeDtypeStruct((b, kv_heads, splits, blocks, 1, rows), F32, **varies),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, kv_heads, splits, blocks, spans),
            in_specs=[
                of_queries(h),
                of_keys(h),
                of_keys(hv),
                *(spec for _, spec in extras.values()),
            ],
            out_specs=[
                of_queries(hv),
                pl.BlockSpec((1, 1, 1, 1, 1, rows), lambda b, k, g, i, j, *_: (b, k, g, i, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((rows, h), q.dtype),
                *sums,
                *(sums if spans > 1 else []),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=64 * 2**20,
        ),
        name="flash_attention_forward",
    )(masks.table, bounded, q, k, v, *(array for array, _ in extras.values()))


def _kernel(names, masks, options, sizes, grid, table, bounded, q_ref, k_ref, v_ref, *refs):
    extras = dict(zip(names, refs, strict=False))
    out_ref, lse_ref, q_scr, acc, top, total, *kept = refs[len(names) :]
    b, kv, _, i, j = (pl.program_id(axis) for axis in range(5))
    blocks, spans = grid
    chunks, rows, cap = sizes.block // sizes.narrow, acc.shape[1], options.softcap
    is_bounded = bounded[b * pl.num_programs(1) + kv] == 1

    def clear():
        acc[...] = jnp.zeros_like(acc)
        _start_sums(extras.get("sinks"), is_bounded, sizes, top, total)

    @pl.when(j == 0)
    def start():
        factor = options.scale * LOG2E if cap is None else options.scale / cap
        q = q_ref[0, 0].reshape(q_scr.shape).astype(F32) * factor
        q_scr[...] = q.astype(q_scr.dtype)
        clear()

    def attend(shift, size, masked, chunk):
        at = pl.ds(pl.multiple_of(chunk * sizes.narrow, sizes.narrow), size)
        s = dot(k_ref[0, 0, at, :], q_scr[...], (1, 1))
        if cap is not None:
            s = jnp.tanh(s) * (cap * LOG2E)
        if masked:
            seen = _visible(options, masks, sizes, extras, i, j * chunks + chunk, chunk)
            s = jnp.where(jnp.concatenate([seen] * sizes.heads, axis=1), s, -jnp.inf)
        if shift == RUNNING:
            before = top[...]
            now = jnp.maximum(before, jnp.max(s, axis=0, keepdims=True))
            fade = jnp.exp2(before - now)
            top[...] = now
            total[...] *= fade
            acc[...] *= fade
        p = jnp.exp2(s if shift is None else s - top[...])
        total[...] += jnp.sum(p.reshape(size // 8, 8, -1), axis=0)
        acc[...] += dot(v_ref[0, 0, at, :], p.astype(v_ref.dtype), (0, 0))

    def run(shift, reach):
        tpu_mask.for_each_chunk(
            reach,
            sizes.wide // sizes.narrow,
            partial(attend, shift, sizes.wide, False),
            partial(attend, shift, sizes.narrow, True),
        )

    def reach():
        return tpu_mask.reach(tpu_mask.row_of(table, masks, b, i, blocks), j, chunks)

    live = tpu_mask.is_live(tpu_mask.row_of(table, masks, b, i, blocks), j, chunks)

    @pl.when(live & is_bounded)
    def free():
        run(None, reach())

    @pl.when(live & ~is_bounded)
    def shifted():
        for here, copy in zip((acc, top, total), kept, strict=False):
            copy[...] = here[...]
        attend(RUNNING, sizes.narrow, True, reach().last())
        run(FIXED, reach().without_last())

        @pl.when(~(jnp.max(total[...]) < LARGEST))
        def again():
            if kept:
                for here, copy in zip((acc, top, total), kept, strict=True):
                    here[...] = copy[...]
            else:
                clear()
            part = partial(attend, RUNNING, sizes.narrow, True)
            tpu_mask.for_each_chunk(reach().all_in_part(), 1, part, part)

    @pl.when(j == spans - 1)
    def finish():
        sums = jnp.sum(total[...], axis=0, keepdims=True)
        out = acc[...] / jnp.where(sums == 0, 1, sums)
        out_ref[0, 0] = out.T.reshape(out_ref.shape[2:]).astype(out_ref.dtype)
        tops = jnp.where(is_bounded, 0.0, top[...])
        lse = (tops + jnp.log2(sums)) / LOG2E
        lse_ref[0, 0, 0, 0] = jnp.where(sums == 0, HIDDEN, lse)


def _start_sums(sinks, is_bounded, sizes, top, total):
    """A learned sink is a first key of its own logit and no value."""
    top[...] = jnp.full_like(top, HIDDEN)
    total[...] = jnp.zeros_like(total)
    if sinks is None:
        return
    head = (pl.program_id(1) * pl.num_programs(2) + pl.program_id(2)) * sizes.heads
    for g in range(sizes.heads):
        of_head = slice(None), pl.ds(g * sizes.rows, sizes.rows)
        sink = jnp.full((1, sizes.rows), sinks[head + g], F32)
        top[of_head] = sink
        total[0:1, of_head[1]] = jnp.where(is_bounded, jnp.exp2(sink), 1.0)


def _visible(options, masks, sizes, extras: dict[str, Any], i, chunk, chunk_here):
    """[narrow, rows] of a chunk of keys and query block i."""
    rows, narrow = sizes.rows, sizes.narrow

    def of_queries(name):
        return extras[name][0, 0, :, :rows] if name in extras else None

    def of_keys(name):
        return tpu_mask.as_column(extras[name][0, chunk_here]) if name in extras else None

    k_index = chunk * narrow + jax.lax.broadcasted_iota(jnp.int32, (narrow, 1), 0)
    q_index = of_queries("positions")
    if q_index is None:
        q_index = i * rows + jax.lax.broadcasted_iota(jnp.int32, (1, rows), 1)
    ranks = of_keys("ranks")
    prefix = extras["prefix"][pl.program_id(0)] if "prefix" in extras else None
    return tpu_mask.visible(
        options,
        masks,
        prefix,
        q_index,
        k_index,
        of_queries("q_segments"),
        of_keys("k_segments"),
        k_index if ranks is None else ranks,
    )
