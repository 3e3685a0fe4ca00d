"""Attention for Hopper GPUs as three Mosaic kernels of Pallas: output, gradient of the queries,
gradients of keys and values.

A program is ROWS rows (queries, or keys in the last), half of them to each of two warpgroups; a
third fetches the chunks that the mask leaves (`ranges.py`), STAGES of them ahead. The softmax has a
running maximum; the backward kernels compute weights anew from log-sum-exp, and add up in a fixed
order (FlashAttention-2, arXiv:2307.08691). Where a product needs a chunk turned, it reads a copy
that lies turned in memory, since Pallas' interpreter of JAX 0.10 can't turn one.

Shapes: q_btnh, k_bskh, v_bskh with T and S multiples of ROWS, turned ones k_bkhs, q_bnht; pos_bt
the index of each query, ids_bt and kv_ids_bs the documents; table [B, blocks, 5], see ranges.py.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention.blocked import Options
from kernels_pallas.attention.reference import HIDDEN
from kernels_pallas.varying import shape_like

# Warpgroups that compute, rows of each, chunks in memory at a time.
GROUPS, EACH, STAGES = 2, 64, 2
ROWS = GROUPS * EACH
# Keys of a chunk forward; keys, or queries, of one backward.
CHUNK, CHUNK_BACK = 128, 64
F32, INT32 = jnp.float32, jnp.int32
LOG2_E = math.log2(math.e)
# The maximum before a row has seen a key: below every score, above what is hidden.
LEAST = HIDDEN / 10


class Mask(NamedTuple):
    """What hides keys from queries, as known when tracing."""

    causal: bool
    window: int | None
    segments: bool
    keys: int | None  # how many there are, where those that fill up the last chunk are to be hidden

    def hides(self) -> bool:
        return self.causal or self.segments or self.keys is not None

    def visible(self, pos, ids, key_first, kv_ids, shape, queries: int) -> jax.Array:
        """Of `shape`, whose axis `queries` is that of pos and ids; the other is that of keys."""
        key = key_first + lax.broadcasted_iota(INT32, shape, 1 - queries)
        terms = []
        if self.causal:
            at = lax.broadcast_in_dim(pos, shape, [queries])
            terms.append(key <= at)
        if self.window is not None:
            terms.append(at - key < self.window)
        if self.segments:
            of_key = lax.broadcast_in_dim(kv_ids, shape, [1 - queries])
            terms.append(lax.broadcast_in_dim(ids, shape, [queries]) == of_key)
        if self.keys is not None:
            terms.append(key < self.keys)
        return functools.reduce(jnp.logical_and, terms)


class Chunks(NamedTuple):
    """Those that a block meets: `table` says which, and which of them without a mask."""

    head: Any
    low: Any
    full_low: Any
    full_high: Any
    high: Any

    @classmethod
    def of(cls, table_ref, *at) -> "Chunks":
        return cls(*(table_ref[(*at, i)] for i in range(5)))

    @property
    def count(self):
        return self.head + self.high - self.low

    def number(self, step):
        return jnp.where(step < self.head, step, self.low + step - self.head)

    def each(self, mask: Mask, meet: Callable[..., Any], carry: Any) -> Any:
        """carry = meet(step, carry, masked=...) for every step in turn."""
        if not mask.hides():
            return lax.fori_loop(0, self.count, functools.partial(meet, masked=False), carry)
        edges = (
            *(jnp.int32(0), self.head + self.full_low - self.low),
            *(self.head + self.full_high - self.low, self.count),
        )
        for masked, (first, last) in zip((True, False, True), itertools.pairwise(edges)):
            carry = lax.fori_loop(first, last, functools.partial(meet, masked=masked), carry)
        return carry


def _slot(step):
    return lax.rem(step, jnp.int32(STAGES))


def _feed(steps, copies, full, free) -> None:
    """The fetching warpgroup: `copies` are pairs of what a step reads and the buffer it goes to."""
    plgpu.set_max_registers(40, action="decrease")

    @pl.loop(0, steps)
    def _(step):
        slot = _slot(step)

        @pl.when(step >= STAGES)
        def _():
            plgpu.barrier_wait(free.at[slot])

        for source, buffer in copies:
            plgpu.copy_gmem_to_smem(source(step), buffer.at[slot], full.at[slot])

    @pl.loop(jnp.maximum(steps - STAGES, 0), steps)
    def _(step):
        plgpu.barrier_wait(free.at[_slot(step)])


def _fetch(pairs, barrier) -> None:
    """Copies what stays for the whole program, one after the other."""
    for source, buffer in pairs:
        plgpu.copy_gmem_to_smem(source, buffer, barrier)
        plgpu.barrier_wait(barrier)


def _product(a, b, shape) -> jax.Array:
    def run(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, F32))


def _scores(options: Options, products) -> jax.Array:
    """In units of log2."""
    if options.softcap is None:
        return products * (options.scale * LOG2_E)
    # The chip's own tanh is right to 11 bits only, its exp2 to 22.
    grown = jnp.exp2(products * (2 * LOG2_E * options.scale / options.softcap))
    return (1 - 2 / (1 + grown)) * (options.softcap * LOG2_E)


def _down(x, shape) -> jax.Array:
    """A number a row."""
    return lax.broadcast_in_dim(x, shape, [0])


def _call(name: str, kernel, outs, scratch, copies: int, grid, names, *arrays):
    barriers = {
        "once": plgpu.Barrier(num_barriers=GROUPS),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
        "free": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
    }
    return plgpu.kernel(
        kernel,
        out_type=[shape_like(shape, dtype, *arrays) for shape, dtype in outs],
        grid=grid,
        grid_names=names,
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name=f"attention_{name}",
        scratch_types={name: plgpu.SMEM(*kind) for name, kind in scratch.items()} | barriers,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(*arrays)


def forward(
    q_btnh, k_bkhs, v_bskh, pos_bt, ids_bt, kv_ids_bs, table, *, options, mask
) -> tuple[jax.Array, jax.Array]:
    """(out_btnh, lse_bnt), the latter in float32; HIDDEN where a query sees nothing."""
    b, t, n, h = q_btnh.shape
    kv_heads, dtype = v_bskh.shape[2], q_btnh.dtype

    def kernel(
        *refs, q_sm, k_sm, v_sm, p_sm, lse_sm, pos_sm, ids_sm, kv_ids_sm, once, full, free
    ):  # fmt: skip
        q_ref, k_ref, v_ref, pos_ref, ids_ref, kv_ids_ref, table_ref, out_ref, lse_ref = refs
        row, head, group = lax.axis_index("b"), lax.axis_index("n"), lax.axis_index("group")
        block = t // ROWS - 1 - lax.axis_index("block")  # the longest first, under a causal mask
        kv_head = lax.div(head, jnp.int32(n // kv_heads))
        chunks = Chunks.of(table_ref, row, block)
        here = pl.ds(block * ROWS + group * EACH, EACH)

        @pl.when(group < GROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            mine = q_sm.at[group]
            pairs = [(q_ref.at[row, here, head], mine)]
            if mask.causal:
                pairs.append((pos_ref.at[row, here], pos_sm.at[group]))
            if mask.segments:
                pairs.append((ids_ref.at[row, here], ids_sm.at[group]))
            _fetch(pairs, once.at[group])
            # What is loaded and never read has no layout, which the compiler refuses.
            pos = pos_sm.at[group][...] if mask.causal else None
            ids = ids_sm.at[group][...] if mask.segments else None

            def meet(step, carry, masked):
                out, top, total = carry
                slot = _slot(step)
                plgpu.barrier_wait(full.at[slot])
                s = _scores(options, _product(mine, k_sm.at[slot], (EACH, CHUNK)))
                if masked:
                    kv_ids = kv_ids_sm.at[slot][...] if mask.segments else None
                    first = chunks.number(step) * CHUNK
                    seen = mask.visible(pos, ids, first, kv_ids, s.shape, queries=0)
                    s = jnp.where(seen, s, HIDDEN)
                higher = jnp.maximum(top, jnp.max(s, axis=1))
                p = jnp.exp2(s - _down(higher, s.shape))
                shrink = jnp.exp2(top - higher)
                total = total * shrink + jnp.sum(p, axis=1)
                p_sm.at[group][...] = p.astype(dtype)
                plgpu.commit_smem()
                more = _product(p_sm.at[group], v_sm.at[slot], (EACH, h))
                plgpu.barrier_arrive(free.at[slot])
                return out * _down(shrink, out.shape) + more, higher, total

            zeros = jnp.zeros((EACH,), F32)
            start = jnp.zeros((EACH, h), F32), jnp.full((EACH,), LEAST, F32), zeros
            out, top, total = chunks.each(mask, meet, start)
            safe = jnp.where(total > 0, total, 1.0)
            mine[...] = (out / _down(safe, out.shape)).astype(dtype)
            lse = top * (1 / LOG2_E) + jnp.log(safe)
            lse_sm.at[group][...] = jnp.where(total > 0, lse, HIDDEN)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out_ref.at[row, here, head])
            plgpu.copy_smem_to_gmem(lse_sm.at[group], lse_ref.at[row, head, here])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == GROUPS)
        def _():
            def at(step):
                return pl.ds(chunks.number(step) * CHUNK, CHUNK)

            copies = [
                (lambda step: k_ref.at[row, kv_head, :, at(step)], k_sm),
                (lambda step: v_ref.at[row, at(step), kv_head], v_sm),
            ]
            if mask.segments:
                copies.append((lambda step: kv_ids_ref.at[row, at(step)], kv_ids_sm))
            _feed(chunks.count, copies, full, free)

    scratch = {
        "q_sm": ((GROUPS, EACH, h), dtype),
        "k_sm": ((STAGES, h, CHUNK), dtype),
        "v_sm": ((STAGES, CHUNK, h), dtype),
        "p_sm": ((GROUPS, EACH, CHUNK), dtype),
        "lse_sm": ((GROUPS, EACH), F32),
        "pos_sm": ((GROUPS, EACH), INT32),
        "ids_sm": ((GROUPS, EACH), INT32),
        "kv_ids_sm": ((STAGES, CHUNK), INT32),
    }
    return _call(
        "forward",
        kernel,
        [(q_btnh.shape, dtype), ((b, n, t), F32)],
        *(scratch, 2 + mask.segments, (n, t // ROWS, b), ("n", "block", "b")),
        *(q_btnh, k_bkhs, v_bskh, pos_bt, ids_bt, kv_ids_bs, table),
    )


def _weights(options, mask, products, seen, lse, axis):
    """Weights and the slope of the soft cap; `lse`, in units of log2, lies along `axis`."""
    s = _scores(options, products)
    slope = None
    if options.softcap is not None:
        part = s * (1 / (options.softcap * LOG2_E))
        slope = 1 - part * part
    if seen is not None:
        s = jnp.where(seen, s, HIDDEN)
    return jnp.exp2(s - lax.broadcast_in_dim(lse, s.shape, [axis])), slope


def _score_gradients(p, slope, dp, delta, axis):
    ds = p * (dp - lax.broadcast_in_dim(delta, p.shape, [axis]))
    return ds if slope is None else ds * slope


def backward_queries(
    q_btnh, k_bskh, k_bkhs, v_bkhs, dout_btnh, lse_bnt, delta_bnt,
    pos_bt, ids_bt, kv_ids_bs, table, *, options, mask,
) -> jax.Array:  # fmt: skip
    """dq_btnh; `lse_bnt` in units of log2 and 0 where a query sees nothing."""
    b, t, n, h = q_btnh.shape
    kv_heads, dtype, chunk = k_bskh.shape[2], q_btnh.dtype, CHUNK_BACK

    def kernel(
        *refs, q_sm, dout_sm, k_sm, k_turned_sm, v_sm, ds_sm, lse_sm, delta_sm, pos_sm, ids_sm,
        kv_ids_sm, once, full, free,
    ):  # fmt: skip
        q_ref, k_ref, k_turned_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs = refs
        pos_ref, ids_ref, kv_ids_ref, table_ref, dq_ref = refs
        row, head, group = lax.axis_index("b"), lax.axis_index("n"), lax.axis_index("group")
        block = t // ROWS - 1 - lax.axis_index("block")
        kv_head = lax.div(head, jnp.int32(n // kv_heads))
        chunks = Chunks.of(table_ref, row, block)
        here = pl.ds(block * ROWS + group * EACH, EACH)

        @pl.when(group < GROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            pairs = [
                (q_ref.at[row, here, head], q_sm.at[group]),
                (dout_ref.at[row, here, head], dout_sm.at[group]),
                (lse_ref.at[row, head, here], lse_sm.at[group]),
                (delta_ref.at[row, head, here], delta_sm.at[group]),
            ]
            if mask.causal:
                pairs.append((pos_ref.at[row, here], pos_sm.at[group]))
            if mask.segments:
                pairs.append((ids_ref.at[row, here], ids_sm.at[group]))
            _fetch(pairs, once.at[group])
            lse, delta = lse_sm.at[group][...], delta_sm.at[group][...]
            pos = pos_sm.at[group][...] if mask.causal else None
            ids = ids_sm.at[group][...] if mask.segments else None

            def run(dq):
                def meet(step, carry, masked):
                    slot = _slot(step)
                    plgpu.barrier_wait(full.at[slot])
                    shape, seen = (EACH, chunk), None
                    products = _product(q_sm.at[group], k_turned_sm.at[slot], shape)
                    if masked:
                        kv_ids = kv_ids_sm.at[slot][...] if mask.segments else None
                        first = chunks.number(step) * chunk
                        seen = mask.visible(pos, ids, first, kv_ids, shape, queries=0)
                    p, slope = _weights(options, mask, products, seen, lse, 0)
                    dp = _product(dout_sm.at[group], v_sm.at[slot], shape)
                    ds = _score_gradients(p, slope, dp, delta, 0)
                    ds_sm.at[group][...] = ds.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.wgmma(dq, ds_sm.at[group], k_sm.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])
                    return carry

                chunks.each(mask, meet, None)
                return dq[...]

            dq = pl.run_scoped(run, plgpu.ACC((EACH, h), F32))
            q_sm.at[group][...] = (dq * options.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_sm.at[group], dq_ref.at[row, here, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == GROUPS)
        def _():
            def at(step):
                return pl.ds(chunks.number(step) * chunk, chunk)

            copies = [
                (lambda step: k_ref.at[row, at(step), kv_head], k_sm),
                (lambda step: k_turned_ref.at[row, kv_head, :, at(step)], k_turned_sm),
                (lambda step: v_ref.at[row, kv_head, :, at(step)], v_sm),
            ]
            if mask.segments:
                copies.append((lambda step: kv_ids_ref.at[row, at(step)], kv_ids_sm))
            _feed(chunks.count, copies, full, free)

    scratch = {
        "q_sm": ((GROUPS, EACH, h), dtype),
        "dout_sm": ((GROUPS, EACH, h), dtype),
        "k_sm": ((STAGES, chunk, h), dtype),
        "k_turned_sm": ((STAGES, h, chunk), dtype),
        "v_sm": ((STAGES, h, chunk), dtype),
        "ds_sm": ((GROUPS, EACH, chunk), dtype),
        "lse_sm": ((GROUPS, EACH), F32),
        "delta_sm": ((GROUPS, EACH), F32),
        "pos_sm": ((GROUPS, EACH), INT32),
        "ids_sm": ((GROUPS, EACH), INT32),
        "kv_ids_sm": ((STAGES, chunk), INT32),
    }
    return _call(
        "backward_queries",
        kernel,
        [(q_btnh.shape, dtype)],
        *(scratch, 3 + mask.segments, (n, t // ROWS, b), ("n", "block", "b")),
        *(q_btnh, k_bskh, k_bkhs, v_bkhs, dout_btnh, lse_bnt, delta_bnt),
        *(pos_bt, ids_bt, kv_ids_bs, table),
    )[0]


def backward_keys(
    q_btnh, q_bnht, k_bskh, v_bskh, dout_btnh, dout_bnht, lse_bnt, delta_bnt,
    pos_bt, ids_bt, kv_ids_bs, table, *, options, mask,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(dk_bskh, dv_bskh). Here a block is of keys, and what it meets are chunks of the queries of
    every head that shares them, head by head."""
    n, h = q_btnh.shape[2:]
    b, s, kv_heads, _ = k_bskh.shape
    per_head, dtype, chunk = n // kv_heads, q_btnh.dtype, CHUNK_BACK

    def kernel(
        *refs, k_sm, v_sm, q_sm, q_turned_sm, dout_sm, dout_turned_sm, ds_sm, lse_sm, delta_sm,
        pos_sm, ids_sm, kv_ids_sm, once, full, free,
    ):  # fmt: skip
        q_ref, q_turned_ref, k_ref, v_ref, dout_ref, dout_turned_ref, *refs = refs
        lse_ref, delta_ref, pos_ref, ids_ref, kv_ids_ref, table_ref, dk_ref, dv_ref = refs
        row, kv_head = lax.axis_index("b"), lax.axis_index("k")
        block, group = lax.axis_index("block"), lax.axis_index("group")
        chunks = Chunks.of(table_ref, row, block)
        start = block * ROWS + group * EACH
        here = pl.ds(start, EACH)

        @pl.when(group < GROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            pairs = [
                (k_ref.at[row, here, kv_head], k_sm.at[group]),
                (v_ref.at[row, here, kv_head], v_sm.at[group]),
            ]
            if mask.segments:
                pairs.append((kv_ids_ref.at[row, here], kv_ids_sm.at[group]))
            _fetch(pairs, once.at[group])
            kv_ids = kv_ids_sm.at[group][...] if mask.segments else None
            mine = ds_sm.at[group]

            def run(dk, dv):
                def meet(step, before, masked):
                    slot = _slot(before + step)
                    plgpu.barrier_wait(full.at[slot])
                    shape, seen = (EACH, chunk), None
                    products = _product(k_sm.at[group], q_turned_sm.at[slot], shape)
                    if masked:
                        pos = pos_sm.at[slot][...] if mask.causal else None
                        ids = ids_sm.at[slot][...] if mask.segments else None
                        seen = mask.visible(pos, ids, start, kv_ids, shape, queries=1)
                    p, slope = _weights(options, mask, products, seen, lse_sm.at[slot][...], 1)
                    mine[...] = p.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.wgmma(dv, mine, dout_sm.at[slot])
                    dp = _product(v_sm.at[group], dout_turned_sm.at[slot], shape)
                    ds = _score_gradients(p, slope, dp, delta_sm.at[slot][...], 1)
                    plgpu.wgmma_wait(0)
                    mine[...] = ds.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.wgmma(dk, mine, q_sm.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])
                    return before

                @pl.loop(0, per_head)
                def _(i):
                    chunks.each(mask, meet, i * chunks.count)

                return dk[...], dv[...]

            kind = plgpu.ACC((EACH, h), F32)
            dk, dv = pl.run_scoped(run, kind, kind)
            k_sm.at[group][...] = (dk * options.scale).astype(dtype)
            v_sm.at[group][...] = dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_sm.at[group], dk_ref.at[row, here, kv_head])
            plgpu.copy_smem_to_gmem(v_sm.at[group], dv_ref.at[row, here, kv_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == GROUPS)
        def _():
            def head(step):
                return kv_head * per_head + lax.div(step, chunks.count)

            def at(step):
                return pl.ds(chunks.number(lax.rem(step, chunks.count)) * chunk, chunk)

            copies = [
                (lambda step: q_ref.at[row, at(step), head(step)], q_sm),
                (lambda step: q_turned_ref.at[row, head(step), :, at(step)], q_turned_sm),
                (lambda step: dout_ref.at[row, at(step), head(step)], dout_sm),
                (lambda step: dout_turned_ref.at[row, head(step), :, at(step)], dout_turned_sm),
                (lambda step: lse_ref.at[row, head(step), at(step)], lse_sm),
                (lambda step: delta_ref.at[row, head(step), at(step)], delta_sm),
            ]
            if mask.causal:
                copies.append((lambda step: pos_ref.at[row, at(step)], pos_sm))
            if mask.segments:
                copies.append((lambda step: ids_ref.at[row, at(step)], ids_sm))
            _feed(per_head * chunks.count, copies, full, free)

    scratch = {
        "k_sm": ((GROUPS, EACH, h), dtype),
        "v_sm": ((GROUPS, EACH, h), dtype),
        "q_sm": ((STAGES, chunk, h), dtype),
        "q_turned_sm": ((STAGES, h, chunk), dtype),
        "dout_sm": ((STAGES, chunk, h), dtype),
        "dout_turned_sm": ((STAGES, h, chunk), dtype),
        "ds_sm": ((GROUPS, EACH, chunk), dtype),
        "lse_sm": ((STAGES, chunk), F32),
        "delta_sm": ((STAGES, chunk), F32),
        "pos_sm": ((STAGES, chunk), INT32),
        "ids_sm": ((STAGES, chunk), INT32),
        "kv_ids_sm": ((GROUPS, EACH), INT32),
    }
    grid, names = (kv_heads, s // ROWS, b), ("k", "block", "b")
    return _call(
        "backward_keys",
        kernel,
        [(k_bskh.shape, dtype)] * 2,
        *(scratch, 6 + mask.causal + mask.segments, grid, names),
        *(q_btnh, q_bnht, k_bskh, v_bskh, dout_btnh, dout_bnht, lse_bnt, delta_bnt),
        *(pos_bt, ids_bt, kv_ids_bs, table),
    )
