"""Forward kernel for TPU (Mosaic).

A block of queries of all heads of a group attends to the keys chunk by chunk. Scores are [keys,
queries]: values per query take one lane each, sums over keys run along sublanes, and both matmuls
fill the matrix unit. Scores are in base 2, with their scale folded into the queries. The softmax is
exact; three cases keep its numbers in range:

- Where `bounded` proves that no score is large, weights are exp2(score).
- Elsewhere the maximum of one chunk is subtracted from the scores of all chunks; any number near
  the largest score works. If no sum of weights exceeds LARGEST, no weight overflowed.
- Otherwise the key block is computed again with a running maximum (Milakov and Gimelshein,
  arXiv:1805.02867).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import tpu_mask
from kernels_pallas.attention.reference import HIDDEN
from kernels_pallas.attention.tpu_mask import LOG2E, dot

F32 = jnp.float32
# The subtracted maximum: of all chunks so far (RUNNING), or of an earlier chunk (FIXED).
RUNNING, FIXED = "running", "fixed"
# Sums of weights up to this did not overflow float32, whose limit is 2**128.
LARGEST = 2.0**100


class Sums(NamedTuple):
    """Accumulators of a block of queries, in float32.

    values  [width of v, queries], weighted sums of values
    top     [1, queries], the number subtracted from all scores
    total   [8, queries], sums of weights, each of every eighth key
    """

    values: Any
    top: Any
    total: Any

    @classmethod
    def shapes(cls, width: int, queries: int) -> "Sums":
        return cls(*(pltpu.VMEM((n, queries), F32) for n in (width, 1, 8)))


def call(q, k, v, masks, sinks, bounded, options, sizes) -> tuple[jax.Array, jax.Array]:
    """Returns (out_bkgth, lse [B, K, G // heads, blocks, 1, heads * rows])."""
    b, kv_heads, groups, t, h = q.shape
    s, hv = k.shape[2], v.shape[3]
    splits, blocks, spans = groups // sizes.heads, t // sizes.rows, s // sizes.block
    queries = sizes.heads * sizes.rows

    def nearest(b, i, j, table):
        row = tpu_mask.row_of(table, masks, b, i, blocks)
        return tpu_mask.nearest_block(row, j, sizes.block // sizes.narrow)

    def of_queries(*tail):
        shape = (1, 1, sizes.heads, sizes.rows, *tail)
        return pl.BlockSpec(shape, lambda b, k, g, i, j, *_: (b, k, g, i, 0))

    def of_keys(width):
        def index(b, k, g, i, j, table, *_):
            return b, k, nearest(b, i, j, table), 0

        return pl.BlockSpec((1, 1, sizes.block, width), index)

    of_rows = pl.BlockSpec((1, 1, 1, 1, 1, queries), lambda b, k, g, i, j, *_: (b, k, g, i, 0, 0))
    extras = tpu_mask.operands(
        masks,
        sizes,
        lambda b, k, g, i, *_: (b, i),
        lambda b, k, g, i, j, table, *_: (b, nearest(b, i, j, table)),
    )
    if sinks is not None:
        extras["sinks"] = sinks, pl.BlockSpec(memory_space=pltpu.SMEM)
    varies = {"manual_axis_type": jax.typeof(q).manual_axis_type}
    sums = Sums.shapes(hv, queries)
    return pl.pallas_call(
        partial(_kernel, tuple(extras), masks, options, sizes, (blocks, spans)),
        out_shape=(
            jax.ShapeDtypeStruct((*q.shape[:4], hv), q.dtype, **varies),
            jax.ShapeDtypeStruct((b, kv_heads, splits, blocks, 1, queries), F32, **varies),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, kv_heads, splits, blocks, spans),
            in_specs=[of_queries(h), of_keys(h), of_keys(hv), *(x[1] for x in extras.values())],
            out_specs=[of_queries(hv), of_rows],
            scratch_shapes=[pltpu.VMEM((queries, h), q.dtype), *sums, *(sums if spans > 1 else [])],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=64 * 2**20,
        ),
        name="flash_attention_forward",
    )(masks.table, bounded, q, k, v, *(x[0] for x in extras.values()))


def _kernel(names, masks, options, sizes, grid, table, bounded, q_ref, k_ref, v_ref, *refs):
    extras = dict(zip(names, refs, strict=False))
    out_ref, lse_ref, q_scr, *scratch = refs[len(names) :]
    sums, saved_sums = Sums(*scratch[:3]), scratch[3:]
    b, kv, _, i, j = (pl.program_id(axis) for axis in range(5))
    blocks, spans = grid
    chunks = sizes.block // sizes.narrow
    is_bounded = bounded[b * pl.num_programs(1) + kv] == 1
    clear = partial(_clear, sums, extras.get("sinks"), is_bounded, sizes)

    @pl.when(j == 0)
    def start():
        q = q_ref[0, 0].reshape(q_scr.shape).astype(F32) * tpu_mask.factor(options)
        q_scr[...] = q.astype(q_scr.dtype)
        clear()

    def attend(shift, size, masked, chunk):
        seen = None
        if masked:
            seen = partial(
                tpu_mask.visible, options, masks, sizes, extras, i, j * chunks + chunk, chunk
            )
        at = pl.ds(pl.multiple_of(chunk * sizes.narrow, sizes.narrow), size)
        _attend(sums, q_scr, k_ref[0, 0, at, :], v_ref[0, 0, at, :], options.softcap, shift, seen)

    def run(shift, reach):
        whole, part = (partial(attend, shift, size) for size in (sizes.wide, sizes.narrow))
        ratio = sizes.wide // sizes.narrow
        tpu_mask.for_each_chunk(reach, ratio, partial(whole, False), partial(part, True))

    def reach():
        return tpu_mask.reach(tpu_mask.row_of(table, masks, b, i, blocks), j, chunks)

    live = tpu_mask.is_live(tpu_mask.row_of(table, masks, b, i, blocks), j, chunks)

    @pl.when(live & is_bounded)
    def free():
        run(None, reach())

    @pl.when(live & ~is_bounded)
    def shifted():
        _copy(sums, saved_sums)
        attend(RUNNING, sizes.narrow, True, reach().last())
        run(FIXED, reach().without_last())

        @pl.when(~(jnp.max(sums.total[...]) < LARGEST))
        def again():
            _copy(saved_sums, sums) if saved_sums else clear()
            part = partial(attend, RUNNING, sizes.narrow, True)
            tpu_mask.for_each_chunk(reach().all_in_part(), 1, part, part)

    pl.when(j == spans - 1)(partial(_finish, sums, is_bounded, out_ref, lse_ref))


def _copy(sources, targets) -> None:
    for source, target in zip(sources, targets, strict=False):
        target[...] = source[...]


def _clear(sums, sinks, is_bounded, sizes) -> None:
    """Resets the accumulators; a learned sink counts as a first key with its logit and no value."""
    sums.values[...] = jnp.zeros_like(sums.values)
    sums.top[...] = jnp.full_like(sums.top, HIDDEN)
    sums.total[...] = jnp.zeros_like(sums.total)
    if sinks is None:
        return
    first = (pl.program_id(1) * pl.num_programs(2) + pl.program_id(2)) * sizes.heads
    logits = jnp.concatenate(
        [jnp.full((1, sizes.rows), sinks[first + g], F32) for g in range(sizes.heads)], axis=1
    )
    sums.top[...] = logits
    sums.total[:1] = jnp.where(is_bounded, jnp.exp2(logits), 1.0)


def _attend(sums, q_ref, k, v, softcap, shift, seen) -> None:
    """Adds a chunk of keys, masked by `seen()` unless that is None."""
    s = dot(k, q_ref[...], (1, 1))
    if softcap is not None:
        s = jnp.tanh(s) * (softcap * LOG2E)
    if seen is not None:
        s = jnp.where(seen(), s, -jnp.inf)
    if shift == RUNNING:
        before = sums.top[...]
        now = jnp.maximum(before, jnp.max(s, axis=0, keepdims=True))
        fade = jnp.exp2(before - now)
        sums.top[...] = now
        sums.total[...] *= fade
        sums.values[...] *= fade
    p = jnp.exp2(s if shift is None else s - sums.top[...])
    sums.total[...] += jnp.sum(p.reshape(-1, *sums.total.shape), axis=0)
    sums.values[...] += dot(v, p.astype(v.dtype), (0, 0))


def _finish(sums, is_bounded, out_ref, lse_ref) -> None:
    total = jnp.sum(sums.total[...], axis=0, keepdims=True)
    out = sums.values[...] / jnp.where(total == 0, 1, total)
    out_ref[0, 0] = out.T.reshape(out_ref.shape[2:]).astype(out_ref.dtype)
    top = jnp.where(is_bounded, 0.0, sums.top[...])
    lse = (top + jnp.log2(total)) / LOG2E
    lse_ref[0, 0, 0, 0] = jnp.where(total == 0, HIDDEN, lse)
