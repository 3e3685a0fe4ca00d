"""Attention for Hopper GPUs in three Pallas Mosaic kernels: output, gradient of the queries,
gradients of keys and values.

A program computes ROWS rows (queries, or keys in the last kernel), half of them in each of two
warpgroups. A third warpgroup prefetches the visible chunks (`ranges.py`), STAGES of them ahead. The
softmax has a running maximum. The backward kernels recompute the weights from the log-sum-exp and
sum in a fixed order (FlashAttention-2, arXiv:2307.08691). Matmuls that need a transposed chunk read
a transposed copy in memory, since the Pallas interpreter of JAX 0.10 cannot transpose one.

Shapes: q_btnh, k_bskh, v_bskh with T and S multiples of ROWS; transposed k_bkhs, q_bnht; pos_bt
the index of each query; ids_bt and kv_ids_bs the documents; table [B, blocks, 5], see ranges.py.
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

# Computing warpgroups, rows of each, chunks in shared memory at a time.
GROUPS, EACH, STAGES = 2, 64, 2
ROWS = GROUPS * EACH
# Keys per chunk in the forward kernel; keys or queries per chunk in the backward kernels.
CHUNK, CHUNK_BACK = 128, 64
F32, INT32 = jnp.float32, jnp.int32
LOG2_E = math.log2(math.e)
# Initial running maximum: below every score, above masked scores.
LEAST = HIDDEN / 10


class Mask(NamedTuple):
    """Static options of the mask."""

    causal: bool
    window: int | None
    segments: bool
    keys: int | None  # number of keys, if the padding of the last chunk must be masked

    def hides(self) -> bool:
        return self.causal or self.segments or self.keys is not None

    def visible(self, pos, ids, key_first, kv_ids, shape, queries: int) -> jax.Array:
        """Boolean mask of `shape`; axis `queries` is that of pos and ids, the other of keys."""
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
    """Chunks that a block attends to, from its entry in the table; see ranges.py."""

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

    def each(self, mask: Mask, attend: Callable[..., Any], carry: Any) -> Any:
        """Folds carry = attend(step, carry, masked=...) over all chunks; returns the last carry."""
        if not mask.hides():
            return lax.fori_loop(0, self.count, functools.partial(attend, masked=False), carry)
        edges = (
            *(jnp.int32(0), self.head + self.full_low - self.low),
            *(self.head + self.full_high - self.low, self.count),
        )
        for masked, (first, last) in zip((True, False, True), itertools.pairwise(edges)):
            carry = lax.fori_loop(first, last, functools.partial(attend, masked=masked), carry)
        return carry


class Static(NamedTuple):
    """Static parameters of a kernel: options, mask, number of queries, query heads per key/value
    head, head width and dtype."""

    options: Options
    mask: Mask
    t: int
    per_head: int
    h: int
    dtype: Any


def _slot(step):
    return lax.rem(step, jnp.int32(STAGES))


def _prefetch(steps, copies, full, free) -> None:
    """Body of the prefetching warpgroup; `copies` are pairs (source(step), buffer)."""
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


def _load(pairs, barrier) -> None:
    """Copies the operands that stay for the whole program, one after the other."""
    for source, buffer in pairs:
        plgpu.copy_gmem_to_smem(source, buffer, barrier)
        plgpu.barrier_wait(barrier)


def _store(pairs) -> None:
    """Copies pairs (shared memory, global memory) out and waits for the copies."""
    plgpu.commit_smem()
    for buffer, target in pairs:
        plgpu.copy_smem_to_gmem(buffer, target)
    plgpu.wait_smem_to_gmem(0)


def _product(a, b, shape) -> jax.Array:
    def run(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, F32))


def _scores(options: Options, products) -> jax.Array:
    """Scores in base 2."""
    if options.softcap is None:
        return products * (options.scale * LOG2_E)
    # tanh by exp2: the hardware's tanh has 11 correct bits, its exp2 has 22.
    grown = jnp.exp2(products * (2 * LOG2_E * options.scale / options.softcap))
    return (1 - 2 / (1 + grown)) * (options.softcap * LOG2_E)


def _per_row(x, shape) -> jax.Array:
    """Broadcasts one number per row."""
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


def _forward_kernel(
    static, *refs, q_sm, k_sm, v_sm, p_sm, lse_sm, pos_sm, ids_sm, kv_ids_sm, once, full, free
):  # fmt: skip
    """Computes out and log-sum-exp of ROWS queries of one head."""
    options, mask, t, per_head, h, dtype = static
    q_ref, k_ref, v_ref, pos_ref, ids_ref, kv_ids_ref, table_ref, out_ref, lse_ref = refs
    row, head, group = lax.axis_index("b"), lax.axis_index("n"), lax.axis_index("group")
    block = t // ROWS - 1 - lax.axis_index("block")  # the longest first, under a causal mask
    kv_head = lax.div(head, jnp.int32(per_head))
    chunks = Chunks.of(table_ref, row, block)
    own_rows = pl.ds(block * ROWS + group * EACH, EACH)

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        q_buffer = q_sm.at[group]
        pairs = [(q_ref.at[row, own_rows, head], q_buffer)]
        if mask.causal:
            pairs.append((pos_ref.at[row, own_rows], pos_sm.at[group]))
        if mask.segments:
            pairs.append((ids_ref.at[row, own_rows], ids_sm.at[group]))
        _load(pairs, once.at[group])
        # The compiler rejects loads whose result is unused: they have no layout.
        pos = pos_sm.at[group][...] if mask.causal else None
        ids = ids_sm.at[group][...] if mask.segments else None

        def attend(step, carry, masked):
            out, top, total = carry
            slot = _slot(step)
            plgpu.barrier_wait(full.at[slot])
            s = _scores(options, _product(q_buffer, k_sm.at[slot], (EACH, CHUNK)))
            if masked:
                kv_ids = kv_ids_sm.at[slot][...] if mask.segments else None
                first = chunks.number(step) * CHUNK
                seen = mask.visible(pos, ids, first, kv_ids, s.shape, queries=0)
                s = jnp.where(seen, s, HIDDEN)
            higher = jnp.maximum(top, jnp.max(s, axis=1))
            p = jnp.exp2(s - _per_row(higher, s.shape))
            shrink = jnp.exp2(top - higher)
            total = total * shrink + jnp.sum(p, axis=1)
            p_sm.at[group][...] = p.astype(dtype)
            plgpu.commit_smem()
            more = _product(p_sm.at[group], v_sm.at[slot], (EACH, h))
            plgpu.barrier_arrive(free.at[slot])
            return out * _per_row(shrink, out.shape) + more, higher, total

        zeros = jnp.zeros((EACH,), F32)
        start = jnp.zeros((EACH, h), F32), jnp.full((EACH,), LEAST, F32), zeros
        out, top, total = chunks.each(mask, attend, start)
        safe = jnp.where(total > 0, total, 1.0)
        q_buffer[...] = (out / _per_row(safe, out.shape)).astype(dtype)
        lse = top * (1 / LOG2_E) + jnp.log(safe)
        lse_sm.at[group][...] = jnp.where(total > 0, lse, HIDDEN)
        targets = out_ref.at[row, own_rows, head], lse_ref.at[row, head, own_rows]
        _store(zip((q_buffer, lse_sm.at[group]), targets))

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
        _prefetch(chunks.count, copies, full, free)


def forward(
    q_btnh, k_bkhs, v_bskh, pos_bt, ids_bt, kv_ids_bs, table, *, options, mask
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_btnh, lse_bnt); lse_bnt is float32, HIDDEN in rows without visible keys."""
    b, t, n, h = q_btnh.shape
    dtype = q_btnh.dtype
    static = Static(options, mask, t, n // v_bskh.shape[2], h, dtype)

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
        functools.partial(_forward_kernel, static),
        [(q_btnh.shape, dtype), ((b, n, t), F32)],
        *(scratch, 2 + mask.segments, (n, t // ROWS, b), ("n", "block", "b")),
        *(q_btnh, k_bkhs, v_bskh, pos_bt, ids_bt, kv_ids_bs, table),
    )


def _weights(options, mask, products, seen, lse, axis):
    """(weights, slope of the soft cap or None); `lse`, in base 2, runs along `axis`."""
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


def _queries_kernel(
    static, *refs, q_sm, dout_sm, k_sm, k_transposed_sm, v_sm, ds_sm, lse_sm, delta_sm, pos_sm,
    ids_sm, kv_ids_sm, once, full, free,
):  # fmt: skip
    """Computes dq of ROWS queries of one head."""
    options, mask, t, per_head, h, dtype = static
    chunk = CHUNK_BACK
    q_ref, k_ref, k_transposed_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs = refs
    pos_ref, ids_ref, kv_ids_ref, table_ref, dq_ref = refs
    row, head, group = lax.axis_index("b"), lax.axis_index("n"), lax.axis_index("group")
    block = t // ROWS - 1 - lax.axis_index("block")
    kv_head = lax.div(head, jnp.int32(per_head))
    chunks = Chunks.of(table_ref, row, block)
    own_rows = pl.ds(block * ROWS + group * EACH, EACH)

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        pairs = [
            (q_ref.at[row, own_rows, head], q_sm.at[group]),
            (dout_ref.at[row, own_rows, head], dout_sm.at[group]),
            (lse_ref.at[row, head, own_rows], lse_sm.at[group]),
            (delta_ref.at[row, head, own_rows], delta_sm.at[group]),
        ]
        if mask.causal:
            pairs.append((pos_ref.at[row, own_rows], pos_sm.at[group]))
        if mask.segments:
            pairs.append((ids_ref.at[row, own_rows], ids_sm.at[group]))
        _load(pairs, once.at[group])
        lse, delta = lse_sm.at[group][...], delta_sm.at[group][...]
        pos = pos_sm.at[group][...] if mask.causal else None
        ids = ids_sm.at[group][...] if mask.segments else None

        def run(dq):
            def attend(step, carry, masked):
                slot = _slot(step)
                plgpu.barrier_wait(full.at[slot])
                shape, seen = (EACH, chunk), None
                products = _product(q_sm.at[group], k_transposed_sm.at[slot], shape)
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

            chunks.each(mask, attend, None)
            return dq[...]

        dq = pl.run_scoped(run, plgpu.ACC((EACH, h), F32))
        q_sm.at[group][...] = (dq * options.scale).astype(dtype)
        _store([(q_sm.at[group], dq_ref.at[row, own_rows, head])])

    @pl.when(group == GROUPS)
    def _():
        def at(step):
            return pl.ds(chunks.number(step) * chunk, chunk)

        copies = [
            (lambda step: k_ref.at[row, at(step), kv_head], k_sm),
            (lambda step: k_transposed_ref.at[row, kv_head, :, at(step)], k_transposed_sm),
            (lambda step: v_ref.at[row, kv_head, :, at(step)], v_sm),
        ]
        if mask.segments:
            copies.append((lambda step: kv_ids_ref.at[row, at(step)], kv_ids_sm))
        _prefetch(chunks.count, copies, full, free)


def backward_queries(
    q_btnh, k_bskh, k_bkhs, v_bkhs, dout_btnh, lse_bnt, delta_bnt,
    pos_bt, ids_bt, kv_ids_bs, table, *, options, mask,
) -> jax.Array:  # fmt: skip
    """Returns dq_btnh. `lse_bnt` is in base 2, and 0 in rows without visible keys."""
    b, t, n, h = q_btnh.shape
    dtype, chunk = q_btnh.dtype, CHUNK_BACK
    static = Static(options, mask, t, n // k_bskh.shape[2], h, dtype)

    scratch = {
        "q_sm": ((GROUPS, EACH, h), dtype),
        "dout_sm": ((GROUPS, EACH, h), dtype),
        "k_sm": ((STAGES, chunk, h), dtype),
        "k_transposed_sm": ((STAGES, h, chunk), dtype),
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
        functools.partial(_queries_kernel, static),
        [(q_btnh.shape, dtype)],
        *(scratch, 3 + mask.segments, (n, t // ROWS, b), ("n", "block", "b")),
        *(q_btnh, k_bskh, k_bkhs, v_bkhs, dout_btnh, lse_bnt, delta_bnt),
        *(pos_bt, ids_bt, kv_ids_bs, table),
    )[0]


def _keys_kernel(
    static, *refs, k_sm, v_sm, q_sm, q_transposed_sm, dout_sm, dout_transposed_sm, ds_sm, lse_sm,
    delta_sm, pos_sm, ids_sm, kv_ids_sm, once, full, free,
):  # fmt: skip
    """Computes dk and dv of ROWS keys of one key/value head."""
    options, mask, _, per_head, h, dtype = static
    chunk = CHUNK_BACK
    q_ref, q_transposed_ref, k_ref, v_ref, dout_ref, dout_transposed_ref, *refs = refs
    lse_ref, delta_ref, pos_ref, ids_ref, kv_ids_ref, table_ref, dk_ref, dv_ref = refs
    row, kv_head = lax.axis_index("b"), lax.axis_index("k")
    block, group = lax.axis_index("block"), lax.axis_index("group")
    chunks = Chunks.of(table_ref, row, block)
    start = block * ROWS + group * EACH
    own_rows = pl.ds(start, EACH)

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        pairs = [
            (k_ref.at[row, own_rows, kv_head], k_sm.at[group]),
            (v_ref.at[row, own_rows, kv_head], v_sm.at[group]),
        ]
        if mask.segments:
            pairs.append((kv_ids_ref.at[row, own_rows], kv_ids_sm.at[group]))
        _load(pairs, once.at[group])
        kv_ids = kv_ids_sm.at[group][...] if mask.segments else None
        ds_buffer = ds_sm.at[group]

        def run(dk, dv):
            def attend(step, before, masked):
                slot = _slot(before + step)
                plgpu.barrier_wait(full.at[slot])
                shape, seen = (EACH, chunk), None
                products = _product(k_sm.at[group], q_transposed_sm.at[slot], shape)
                if masked:
                    pos = pos_sm.at[slot][...] if mask.causal else None
                    ids = ids_sm.at[slot][...] if mask.segments else None
                    seen = mask.visible(pos, ids, start, kv_ids, shape, queries=1)
                p, slope = _weights(options, mask, products, seen, lse_sm.at[slot][...], 1)
                ds_buffer[...] = p.astype(dtype)
                plgpu.commit_smem()
                plgpu.wgmma(dv, ds_buffer, dout_sm.at[slot])
                dp = _product(v_sm.at[group], dout_transposed_sm.at[slot], shape)
                ds = _score_gradients(p, slope, dp, delta_sm.at[slot][...], 1)
                plgpu.wgmma_wait(0)
                ds_buffer[...] = ds.astype(dtype)
                plgpu.commit_smem()
                plgpu.wgmma(dk, ds_buffer, q_sm.at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot])
                return before

            @pl.loop(0, per_head)
            def _(i):
                chunks.each(mask, attend, i * chunks.count)

            return dk[...], dv[...]

        kind = plgpu.ACC((EACH, h), F32)
        dk, dv = pl.run_scoped(run, kind, kind)
        k_sm.at[group][...] = (dk * options.scale).astype(dtype)
        v_sm.at[group][...] = dv.astype(dtype)
        targets = dk_ref.at[row, own_rows, kv_head], dv_ref.at[row, own_rows, kv_head]
        _store(zip((k_sm.at[group], v_sm.at[group]), targets))

    @pl.when(group == GROUPS)
    def _():
        def head(step):
            return kv_head * per_head + lax.div(step, chunks.count)

        def at(step):
            return pl.ds(chunks.number(lax.rem(step, chunks.count)) * chunk, chunk)

        refs = q_ref, q_transposed_ref, dout_ref, dout_transposed_ref, lse_ref, delta_ref
        buffers = q_sm, q_transposed_sm, dout_sm, dout_transposed_sm, lse_sm, delta_sm
        copies = _query_copies(
            mask, row, head, at, (*refs, pos_ref, ids_ref), (*buffers, pos_sm, ids_sm)
        )
        _prefetch(per_head * chunks.count, copies, full, free)


def _query_copies(mask, row, head, at, refs, buffers) -> list:
    """Pairs (source(step), buffer) of a chunk of queries, for `_prefetch`."""
    q, q_transposed, dout, dout_transposed, lse, delta, pos, ids = refs
    sources = [
        lambda step: q.at[row, at(step), head(step)],
        lambda step: q_transposed.at[row, head(step), :, at(step)],
        lambda step: dout.at[row, at(step), head(step)],
        lambda step: dout_transposed.at[row, head(step), :, at(step)],
        lambda step: lse.at[row, head(step), at(step)],
        lambda step: delta.at[row, head(step), at(step)],
        lambda step: pos.at[row, at(step)],
        lambda step: ids.at[row, at(step)],
    ]
    used = [True] * 6 + [mask.causal, mask.segments]
    return list(itertools.compress(zip(sources, buffers), used))


def backward_keys(
    q_btnh, q_bnht, k_bskh, v_bskh, dout_btnh, dout_bnht, lse_bnt, delta_bnt,
    pos_bt, ids_bt, kv_ids_bs, table, *, options, mask,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Returns (dk_bskh, dv_bskh). A block holds keys and loops over chunks of the queries of each
    head that shares them, head by head."""
    _, t, n, h = q_btnh.shape
    b, s, kv_heads, _ = k_bskh.shape
    dtype, chunk = q_btnh.dtype, CHUNK_BACK
    static = Static(options, mask, t, n // kv_heads, h, dtype)

    scratch = {
        "k_sm": ((GROUPS, EACH, h), dtype),
        "v_sm": ((GROUPS, EACH, h), dtype),
        "q_sm": ((STAGES, chunk, h), dtype),
        "q_transposed_sm": ((STAGES, h, chunk), dtype),
        "dout_sm": ((STAGES, chunk, h), dtype),
        "dout_transposed_sm": ((STAGES, h, chunk), dtype),
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
        functools.partial(_keys_kernel, static),
        [(k_bskh.shape, dtype)] * 2,
        *(scratch, 6 + mask.causal + mask.segments, grid, names),
        *(q_btnh, q_bnht, k_bskh, v_bskh, dout_btnh, dout_bnht, lse_bnt, delta_bnt),
        *(pos_bt, ids_bt, kv_ids_bs, table),
    )
