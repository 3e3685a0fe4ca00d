"""The backward kernel for TPU (Mosaic): gradients of queries, keys and values in one pass.

Weights are computed anew from the log of the softmax's denominator (FlashAttention,
arXiv:2205.14135), with scores transposed, [keys, queries], so that what belongs to queries
broadcasts along sublanes and four of the five products take their operands as they lie. A span of
keys stays in memory while all queries pass, gathering its gradients; those of queries are complete
after one span, and where there are several, they are added up in place from span to span. The order
of all sums is fixed.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import tpu_mask
from kernels_pallas.attention.tpu_mask import LANES, dot

F32 = jnp.float32
LOG2E = math.log2(math.e)


def call(q, k, v, dout, lse, delta, masks, options, sizes) -> tuple[jax.Array, ...]:
    """(dq_bkgth, dk_bksh, dv_bksh); dq is in float32 where several spans add to it. `lse` is in
    powers of two."""
    b, kv_heads, groups, t, h = q.shape
    s, hv = k.shape[2], v.shape[3]
    splits, blocks, spans = groups // sizes.heads, t // sizes.rows, s // sizes.block
    chunks = sizes.block // sizes.narrow
    rows = sizes.heads * sizes.rows

    def of_queries(width):
        shape = (1, 1, sizes.heads, sizes.rows, width)
        return pl.BlockSpec(shape, lambda b, k, j, g, i, *_: (b, k, g, i, 0))

    def of_keys(width):
        return pl.BlockSpec((1, 1, sizes.block, width), lambda b, k, j, g, i, *_: (b, k, j, 0))

    of_rows = pl.BlockSpec((1, 1, 1, 1, 1, rows), lambda b, k, j, g, i, *_: (b, k, g, i, 0, 0))
    q_ids = pl.BlockSpec(
        (1, 1, 1, -(-sizes.rows // LANES) * LANES), lambda b, k, j, g, i, *_: (b, i, 0, 0)
    )
    k_ids = pl.BlockSpec((1, chunks, 1, sizes.narrow), lambda b, k, j, g, i, *_: (b, j, 0, 0))
    extras = {
        "prefix": (masks.prefix_b, pl.BlockSpec(memory_space=pltpu.SMEM)),
        "q_segments": (masks.q_segments, q_ids),
        "positions": (masks.positions, q_ids),
        "k_segments": (masks.k_segments, k_ids),
        "ranks": (masks.ranks, k_ids),
    }
    extras = {name: pair for name, pair in extras.items() if pair[0] is not None}
    varies = {"manual_axis_type": jax.typeof(q).manual_axis_type}
    dq = jax.ShapeDtypeStruct(q.shape, q.dtype if spans == 1 else F32, **varies)
    dk, dv = (jax.ShapeDtypeStruct(x.shape, x.dtype, **varies) for x in (k, v))
    kernel = partial(_kernel, tuple(extras), masks, options, sizes, (blocks, spans))
    in_place = (
        []
        if spans == 1
        else [
            pltpu.VMEM((sizes.heads, sizes.rows, h), F32),
            pltpu.SemaphoreType.DMA,
        ]
    )
    return pl.pallas_call(
        kernel,
        out_shape=(dq, dk, dv),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, kv_heads, spans, splits, blocks),
            in_specs=[
                of_queries(h),
                of_keys(h),
                of_keys(hv),
                of_queries(hv),
                of_rows,
                of_rows,
                *(spec for _, spec in extras.values()),
            ],
            out_specs=[
                of_queries(h) if spans == 1 else pl.BlockSpec(memory_space=pl.ANY),
                of_keys(h),
                of_keys(hv),
            ],
            scratch_shapes=[
                pltpu.VMEM((rows, h), q.dtype),
                pltpu.VMEM((h, rows), F32),
                pltpu.VMEM((sizes.block, h), F32),
                pltpu.VMEM((sizes.block, hv), F32),
                *in_place,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=64 * 2**20,
        ),
        name="flash_attention_backward",
    )(masks.table, q, k, v, dout, lse, delta, *(array for array, _ in extras.values()))


def _kernel(
    names, masks, options, sizes, grid, table,
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs,
):  # fmt: skip
    extras = dict(zip(names, refs, strict=False))
    dq_ref, dk_ref, dv_ref, q_scr, dq, dk, dv, *in_place = refs[len(names) :]
    b, kv, j, split, i = (pl.program_id(axis) for axis in range(5))
    blocks, spans = grid
    chunks = sizes.block // sizes.narrow
    rows = sizes.heads * sizes.rows
    # Scores come in powers of two, or as the tangent's argument.
    cap = options.softcap
    factor = options.scale * LOG2E if cap is None else options.scale / cap

    @pl.when((split == 0) & (i == 0))
    def start():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def meet(size, masked, chunk):
        at = pl.ds(pl.multiple_of(chunk * sizes.narrow, sizes.narrow), size)
        k, v = k_ref[0, 0, at, :], v_ref[0, 0, at, :]
        dout = dout_ref[0, 0].reshape(rows, -1)
        s = dot(k, q_scr[...], (1, 1))
        if cap is not None:
            capped = jnp.tanh(s)
            s = capped * (cap * LOG2E)
        if masked:
            seen = _visible(options, masks, sizes, extras, i, j * chunks + chunk, chunk)
            s = jnp.where(jnp.concatenate([seen] * sizes.heads, axis=1), s, -jnp.inf)
        p = jnp.exp2(s - lse_ref[0, 0, 0, 0])
        dv[at, :] += dot(p.astype(dout.dtype), dout, (1, 0))
        ds = p * (dot(v, dout, (1, 1)) - delta_ref[0, 0, 0, 0])
        if cap is not None:
            ds *= 1 - capped * capped
        ds = ds.astype(k.dtype)
        dk[at, :] += dot(ds, q_scr[...], (1, 0))
        dq[...] += dot(k, ds, (0, 0))

    live = tpu_mask.is_live(tpu_mask.row_of(table, masks, b, i, blocks), j, chunks)
    heads = pl.ds(split * sizes.heads, sizes.heads)
    place = b, kv, heads, pl.ds(i * sizes.rows, sizes.rows), slice(None)

    @pl.when(live)
    def run():
        q_scr[...] = (q_ref[0, 0].reshape(rows, -1).astype(F32) * factor).astype(q_scr.dtype)
        dq[...] = jnp.zeros_like(dq)
        tpu_mask.for_each_chunk(
            tpu_mask.reach(tpu_mask.row_of(table, masks, b, i, blocks), j, chunks),
            sizes.wide // sizes.narrow,
            partial(meet, sizes.wide, False),
            partial(meet, sizes.narrow, True),
        )
        dq[...] *= options.scale

    pl.when(~live & (j == 0))(partial(_clear, dq))
    if spans == 1:
        dq_ref[0, 0] = dq[...].T.reshape(dq_ref.shape[2:]).astype(dq_ref.dtype)
    else:
        pl.when(live | (j == 0))(partial(_add, dq, dq_ref.at[place], j > 0, *in_place))

    @pl.when((split == pl.num_programs(3) - 1) & (i == blocks - 1))
    def finish():
        dk_ref[0, 0] = (dk[...] * (options.scale / factor)).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv[...].astype(dv_ref.dtype)


def _clear(ref):
    ref[...] = jnp.zeros_like(ref)


def _add(part, sum_hbm, started, buffer, semaphore):
    """Adds `part` to the sum, which is there if `started`."""

    @pl.when(started)
    def read():
        copy = pltpu.make_async_copy(sum_hbm, buffer, semaphore)
        copy.start()
        copy.wait()
        part[...] += buffer[...].reshape(part.shape[::-1]).T

    buffer[...] = part[...].T.reshape(buffer.shape)
    copy = pltpu.make_async_copy(buffer, sum_hbm, semaphore)
    copy.start()
    copy.wait()


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
