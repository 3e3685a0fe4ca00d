"""Backward kernel for TPU (Mosaic): gradients of queries, keys and values in one pass.

Recomputes the weights from the log-sum-exp (FlashAttention, arXiv:2205.14135). Scores are
transposed, [keys, queries], so that values per query broadcast along sublanes and only k is
transposed, for the gradient of q. A span of keys stays in vector memory and accumulates its
gradients while all queries pass. With several spans, gradients of queries accumulate in place, in
HBM, from span to span. All sums have a fixed order, so gradients are deterministic.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import tpu_mask
from kernels_pallas.attention.tpu_mask import LOG2E, dot

F32 = jnp.float32


def call(q, k, v, dout, lse, delta, masks, options, sizes) -> tuple[jax.Array, ...]:
    """Returns (dq_bkgth, dk_bksh, dv_bksh); dq is float32 if several spans add to it. `lse` is in
    base 2."""
    b, kv_heads, groups, t, h = q.shape
    s, hv = k.shape[2], v.shape[3]
    splits, blocks, spans = groups // sizes.heads, t // sizes.rows, s // sizes.block
    rows = sizes.heads * sizes.rows

    def of_queries(width):
        shape = (1, 1, sizes.heads, sizes.rows, width)
        return pl.BlockSpec(shape, lambda b, k, j, g, i, *_: (b, k, g, i, 0))

    def of_keys(width):
        return pl.BlockSpec((1, 1, sizes.block, width), lambda b, k, j, g, i, *_: (b, k, j, 0))

    of_rows = pl.BlockSpec((1, 1, 1, 1, 1, rows), lambda b, k, j, g, i, *_: (b, k, g, i, 0, 0))
    extras = tpu_mask.operands(
        masks, sizes, lambda b, k, j, g, i, *_: (b, i), lambda b, k, j, g, i, *_: (b, j)
    )
    varies = {"manual_axis_type": jax.typeof(q).manual_axis_type}
    dq = jax.ShapeDtypeStruct(q.shape, q.dtype if spans == 1 else F32, **varies)
    dk, dv = (jax.ShapeDtypeStruct(x.shape, x.dtype, **varies) for x in (k, v))
    of_block = pltpu.VMEM((sizes.heads, sizes.rows, h), F32)
    in_place = [of_block, of_block, pltpu.SMEM((1,), jnp.int32), *[pltpu.SemaphoreType.DMA] * 2]
    return pl.pallas_call(
        partial(_kernel, tuple(extras), masks, options, sizes, (blocks, spans)),
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
                *(in_place if spans > 1 else []),
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
    factor = tpu_mask.factor(options)

    heads = pl.ds(split * sizes.heads, sizes.heads)
    place = b, kv, heads, pl.ds(i * sizes.rows, sizes.rows), slice(None)
    running = _Running(dq_ref.at[place], *in_place) if spans > 1 else None

    @pl.when((split == 0) & (i == 0))
    def start():
        _clear(dk)
        _clear(dv)
        if running:
            running.begin()

    def attend(size, masked, chunk):
        seen = None
        if masked:
            seen = partial(
                tpu_mask.visible, options, masks, sizes, extras, i, j * chunks + chunk, chunk
            )
        at = pl.ds(pl.multiple_of(chunk * sizes.narrow, sizes.narrow), size)
        of_queries = q_scr[...], dout_ref[0, 0].reshape(q_scr.shape[0], -1), lse_ref, delta_ref
        of_keys = k_ref[0, 0, at, :], v_ref[0, 0, at, :]
        _gather(dq, dk.at[at], dv.at[at], *of_queries, *of_keys, options.softcap, seen)

    live = tpu_mask.is_live(tpu_mask.row_of(table, masks, b, i, blocks), j, chunks)
    if running:
        pl.when(live & (j > 0))(running.fetch)

    @pl.when(live)
    def run():
        q_scr[...] = (q_ref[0, 0].reshape(q_scr.shape).astype(F32) * factor).astype(q_scr.dtype)
        _clear(dq)
        tpu_mask.for_each_chunk(
            tpu_mask.reach(tpu_mask.row_of(table, masks, b, i, blocks), j, chunks),
            sizes.wide // sizes.narrow,
            partial(attend, sizes.wide, False),
            partial(attend, sizes.narrow, True),
        )
        dq[...] *= options.scale

    pl.when(~live & (j == 0))(partial(_clear, dq))
    if spans == 1:
        dq_ref[0, 0] = dq[...].T.reshape(dq_ref.shape[2:]).astype(dq_ref.dtype)
    else:
        pl.when(live & (j > 0))(partial(running.add_to, dq))
        pl.when(live | (j == 0))(partial(running.store, dq))

    @pl.when((split == pl.num_programs(3) - 1) & (i == blocks - 1))
    def finish():
        if running:
            running.settle()
        dk_ref[0, 0] = (dk[...] * (options.scale / factor)).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv[...].astype(dv_ref.dtype)


def _gather(dq, dk, dv, q, dout, lse_ref, delta_ref, k, v, softcap, seen) -> None:
    """Adds the gradients of a chunk of keys, masked by `seen()` unless that is None, to dq [h,
    queries], dk [keys, h] and dv [keys, width of v]."""
    s = dot(k, q, (1, 1))
    if softcap is not None:
        capped = jnp.tanh(s)
        s = capped * (softcap * LOG2E)
    if seen is not None:
        s = jnp.where(seen(), s, -jnp.inf)
    p = jnp.exp2(s - lse_ref[0, 0, 0, 0])
    dv[...] += dot(p.astype(dout.dtype), dout, (1, 0))
    ds = p * (dot(v, dout, (1, 1)) - delta_ref[0, 0, 0, 0])
    if softcap is not None:
        ds *= 1 - capped * capped
    ds = ds.astype(k.dtype)
    dk[...] += dot(ds, q, (1, 0))
    dq[...] += dot(k, ds, (0, 0))


def _clear(ref):
    ref[...] = jnp.zeros_like(ref)


class _Running(NamedTuple):
    """Sum of dq in HBM over spans of keys. Copies overlap with compute: the read starts with the
    block, the write ends during the next block.

    A span visits each block once and ends after its last write, so no block is read before it is
    written. `busy` is 1 while a write is in flight; blocks without visible keys in a span write
    nothing.
    """

    place: Any
    read: Any
    written: Any
    busy: Any
    read_done: Any
    write_done: Any

    def begin(self) -> None:
        self.busy[0] = 0

    def fetch(self) -> None:
        self._reading().start()

    def add_to(self, dq) -> None:
        self._reading().wait()
        dq[...] += self.read[...].reshape(dq.shape[::-1]).T

    def store(self, dq) -> None:
        self.settle()
        self.written[...] = dq[...].T.reshape(self.written.shape)
        self._writing().start()
        self.busy[0] = 1

    def settle(self) -> None:
        """Waits for the write in flight, if any. All writes have the same size."""
        pl.when(self.busy[0] == 1)(self._writing().wait)

    def _reading(self):
        return pltpu.make_async_copy(self.place, self.read, self.read_done)

    def _writing(self):
        return pltpu.make_async_copy(self.written, self.place, self.write_done)
