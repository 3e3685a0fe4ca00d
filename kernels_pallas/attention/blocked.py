"""Attention in plain JAX, in blocks of queries. Memory grows linearly with the length.

A block of queries attends to all its visible keys at once, with an ordinary softmax. Blocks form a
few sections; keys that no query of a section sees (later ones under a causal mask, those before a
window) are skipped. With `by_chunks`, for accelerators, blocks of packed documents instead loop
over the chunks of keys that some query of the block sees, so that work and scores grow with the
documents, not with the row.

The backward pass recomputes the scores from the log-sum-exp (FlashAttention, arXiv:2205.14135).
They are transposed, so that each of the five matmuls reads its operands in their layout; XLA on CPU
would copy the large ones.

Shapes: q_bkgth with N = K * G, k_bksh, v_bksh; a block of queries is [B, K, G * block, H].
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.ranges import HEAD, HIGH, LOW, ranges
from kernels_pallas.attention.reference import HIDDEN
from kernels_pallas.varying import varying_alike

# Most sections of a causal mask: 4 compute 5/8 of the square, close to the half that is needed.
# Each section adds code to the program, which pays off if it has this many blocks.
SECTIONS, BLOCKS_OF_A_SECTION = 4, 4
# Queries per block and keys per chunk with `by_chunks`.
CHUNK = 512
F32 = jnp.float32


class Options(NamedTuple):
    """Static options of a call; see `flash_attention`."""

    causal: bool
    window: int | None
    sink_tokens: int
    softcap: float | None
    scale: float


class Extras(NamedTuple):
    """Optional arrays of a call; see `flash_attention`."""

    segments_bt: jax.Array | None
    kv_segments_bs: jax.Array | None
    ranks_bs: jax.Array | None  # index of each key in its document; None: s
    positions_bt: jax.Array | None
    prefix_b: jax.Array | None
    sinks_n: jax.Array | None
    alibi_n: jax.Array | None

    def arbitrary_range(self) -> bool:
        """Whether a query may attend to keys at any distance, so that no section can skip any."""
        return self.positions_bt is not None or self.prefix_b is not None


class Section(NamedTuple):
    """`blocks` blocks of `size` queries from `start`, each with `span` keys: the first ones or, if
    `moving`, the last ones up to the end of the block."""

    start: int
    blocks: int
    size: int
    span: int
    moving: bool


def sections(t: int, s: int, block: int, options: Options, indexed: bool) -> list[Section]:
    """Sections of T queries and S keys. `indexed`: `Extras.arbitrary_range`."""
    blocks = -(-t // block)
    if indexed or not options.causal:
        return [Section(0, blocks, block, s, False)]
    if options.window is not None and not options.sink_tokens:
        return [Section(0, blocks, block, min(s, block + options.window - 1), True)]
    parts = min(blocks, SECTIONS, max(2, blocks // BLOCKS_OF_A_SECTION))
    edges = [round(i * blocks / parts) for i in range(parts + 1)]
    return [
        Section(low * block, high - low, block, min(s, high * block), False)
        for low, high in itertools.pairwise(edges)
    ]


def forward(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    extras: Extras,
    *,
    options: Options,
    block: int,
    by_chunks: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_btnh, lse_bkgt); 0 and HIDDEN in rows without visible keys."""
    t, kv_heads = q_btnh.shape[1], k_bskh.shape[2]
    if by_chunks and _packed(extras, t):
        return _forward_by_chunks(q_btnh, k_bskh, v_bskh, extras, options)
    block = min(block, t)
    q = _by_group(q_btnh, kv_heads, block)
    k, v = jnp.swapaxes(k_bskh, 1, 2), jnp.swapaxes(v_bskh, 1, 2)
    extras = _padded(extras, block)
    outs, lses = [], []
    for section in sections(t, k.shape[2], block, options, extras.arbitrary_range()):

        def body(_, i, section=section):
            q_start = section.start + i * section.size
            k_start = _k_start(section, q_start, options, k.shape[2])
            out, lse = _block_forward(options, section, q_start, k_start, q, k, v, extras)
            return None, (out.astype(q.dtype), lse)

        out, lse = _loop(body, None, section.blocks)[1]
        outs.append(_join(out))
        lses.append(_join(lse))
    return _ungroup(jnp.concatenate(outs, 3), t), jnp.concatenate(lses, 3)[..., :t]


def backward(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    extras: Extras,
    out_btnh: jax.Array,
    lse_bkgt: jax.Array,
    dout_btnh: jax.Array,
    dlse_bkgt: jax.Array,
    *,
    options: Options,
    block: int,
    by_chunks: bool = False,
) -> tuple[Any, ...]:
    """Returns gradients (dq_btnh, dk_bskh, dv_bskh, dsinks_n, dalibi_n); the last two are None
    without sinks and alibi."""
    b, t, n, _ = q_btnh.shape
    by_chunks = by_chunks and _packed(extras, t)
    block = CHUNK if by_chunks else min(block, t)
    s, kv_heads = k_bskh.shape[1:3]
    groups = n // kv_heads
    delta_btn = jnp.sum(dout_btnh.astype(F32) * out_btnh.astype(F32), axis=-1)
    # d lse / d score is the weight p, as in the softmax, so both gradients are one difference.
    delta = jnp.moveaxis(delta_btn.reshape(b, t, kv_heads, groups), 1, 3) - dlse_bkgt
    dsinks_n = None
    if extras.sinks_n is not None:
        weight = jnp.exp(extras.sinks_n.astype(F32).reshape(kv_heads, groups, 1) - lse_bkgt)
        dsinks_n = -jnp.sum(weight * delta, axis=(0, 3)).reshape(n)
        dsinks_n = dsinks_n.astype(extras.sinks_n.dtype)

    q, dout = _by_group(q_btnh, kv_heads, block), _by_group(dout_btnh, kv_heads, block)
    k, v = jnp.swapaxes(k_bskh, 1, 2), jnp.swapaxes(v_bskh, 1, 2)
    rows = q, dout, _pad(delta, 3, block), _pad(lse_bkgt, 3, block)
    padded = _padded(extras, block)
    if by_chunks:
        k, v, padded = _in_chunks(k, v, padded)
    zeros = [jnp.zeros(shape, F32) for shape in (k.shape, v.shape, (kv_heads, groups))]
    sums = tuple(varying_alike(*zeros, q)[:3])
    dqs = []
    if by_chunks:
        sums, dq = _backward_by_chunks(sums, rows, k, v, extras, padded, options)
        dqs.append(dq)
    for section in [] if by_chunks else sections(t, s, block, options, extras.arbitrary_range()):

        def body(sums, i, section=section):
            q_start = section.start + i * section.size
            k_start = _k_start(section, q_start, options, s)
            arrays = sums, rows, k, v, padded
            sums, dq = _block_backward(options, section, q_start, k_start, *arrays)
            return sums, dq.astype(q_btnh.dtype)

        sums, dq = _loop(body, sums, section.blocks)
        dqs.append(_join(dq))
    dk, dv, dalibi = sums
    dk, dv = dk[:, :, :s], dv[:, :, :s]
    dalibi_n = None if extras.alibi_n is None else dalibi.reshape(n).astype(extras.alibi_n.dtype)
    dk_bskh = jnp.swapaxes(dk, 1, 2).astype(k.dtype)
    dv_bskh = jnp.swapaxes(dv, 1, 2).astype(v.dtype)
    return _ungroup(jnp.concatenate(dqs, 3), t), dk_bskh, dv_bskh, dsinks_n, dalibi_n


def _packed(extras, t):
    """Whether segments may hide chunks of keys. Sinks are not supported chunk by chunk."""
    return extras.segments_bt is not None and extras.sinks_n is None and t > CHUNK


def _forward_by_chunks(q_btnh, k_bskh, v_bskh, extras, options):
    """Computes a softmax per chunk of keys and merges them by their log-sum-exp."""
    t, s, kv_heads = q_btnh.shape[1], *k_bskh.shape[1:3]
    q = _by_group(q_btnh, kv_heads, CHUNK)
    k, v = jnp.swapaxes(k_bskh, 1, 2), jnp.swapaxes(v_bskh, 1, 2)
    low, high = _reach(options, extras, t, s)
    k, v, extras = _in_chunks(k, v, _padded(extras, CHUNK))
    section = Section(0, q.shape[3] // CHUNK, CHUNK, CHUNK, False)
    shape = (*q.shape[:3], CHUNK)
    nothing = jnp.zeros((*shape, v.shape[-1]), F32), jnp.full(shape, HIDDEN, F32)
    nothing = tuple(varying_alike(*nothing, q)[:2])

    def body(_, i):
        def step(j, carry):
            out, lse = carry
            starts = i * CHUNK, j * CHUNK
            more, more_lse = _block_forward(options, section, *starts, q, k, v, extras)
            both = jnp.logaddexp(lse, more_lse)
            old, new = (jnp.exp(x - both)[..., None] for x in (lse, more_lse))
            return out * old + more * new, both

        out, lse = jax.lax.fori_loop(low[i], high[i], step, nothing)
        return None, (out.astype(q.dtype), lse)

    out, lse = _loop(body, None, section.blocks)[1]
    return _ungroup(_join(out), t), _join(lse)[..., :t]


def _backward_by_chunks(sums, rows, k, v, extras, padded, options):
    """Returns ((dk, dv, dalibi), dq_bkgth)."""
    q = rows[0]
    low, high = _reach(options, extras, extras.segments_bt.shape[1], extras.kv_segments_bs.shape[1])
    section = Section(0, q.shape[3] // CHUNK, CHUNK, CHUNK, False)
    nothing = varying_alike(jnp.zeros((*q.shape[:3], CHUNK, q.shape[4]), F32), q)[0]

    def body(sums, i):
        def step(j, carry):
            sums, dq = carry
            starts = i * CHUNK, j * CHUNK
            sums, more = _block_backward(options, section, *starts, sums, rows, k, v, padded)
            return sums, dq + more

        sums, dq = jax.lax.fori_loop(low[i], high[i], step, (sums, nothing))
        return sums, dq.astype(q.dtype)

    sums, dq = _loop(body, sums, section.blocks)
    return sums, _join(dq)


def _reach(options, extras, t, s):
    """(low, high), [blocks] each: chunks low..high-1 hold all keys visible to a block of queries in
    any row of the batch."""
    table = jnp.asarray(ranges(options, extras, t, s, rows=CHUNK, chunk=CHUNK))
    low, high = jnp.where(table[..., HEAD] > 0, 0, table[..., LOW]), table[..., HIGH]
    low = jnp.where(low < high, low, -(-s // CHUNK))
    return jnp.min(low, 0), jnp.max(high, 0)


def _in_chunks(k, v, extras):
    """Pads keys and values to whole chunks, with a segment id that no query has."""
    short = -k.shape[2] % CHUNK
    unused = jnp.max(extras.segments_bt) + 1
    ids = jnp.pad(extras.kv_segments_bs, ((0, 0), (0, short)), constant_values=unused)
    ranks = None if extras.ranks_bs is None else _pad(extras.ranks_bs, 1, CHUNK)
    return _pad(k, 2, CHUNK), _pad(v, 2, CHUNK), extras._replace(kv_segments_bs=ids, ranks_bs=ranks)


def _by_group(x_btnh, kv_heads, block):
    """[B, T, N, H] -> [B, K, G, T padded to a multiple of block, H]."""
    b, t, n, h = x_btnh.shape
    x = jnp.transpose(x_btnh.reshape(b, t, kv_heads, n // kv_heads, h), (0, 2, 3, 1, 4))
    return _pad(x, 3, block)


def _ungroup(x_bkgth, t):
    b, k, g, _, h = x_bkgth.shape
    return jnp.transpose(x_bkgth[:, :, :, :t], (0, 3, 1, 2, 4)).reshape(b, t, k * g, h)


def _pad(x, axis, block):
    """x padded with zeros to a multiple of block."""
    short = -x.shape[axis] % block
    widths = [(0, short if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if short else x


def _padded(extras, block):
    """Extras with the arrays of queries padded to whole blocks."""
    return extras._replace(
        segments_bt=None if extras.segments_bt is None else _pad(extras.segments_bt, 1, block),
        positions_bt=None if extras.positions_bt is None else _pad(extras.positions_bt, 1, block),
    )


def _loop(body, carry, blocks):
    """lax.scan over 0..blocks-1; without a loop for a single block."""
    if blocks == 1:
        carry, ys = body(carry, 0)
        return carry, jax.tree.map(lambda y: y[None], ys)
    return jax.lax.scan(body, carry, jnp.arange(blocks))


def _join(y):
    """[blocks, B, K, G, block, ...] -> [B, K, G, T, ...]."""
    y = jnp.moveaxis(y, 0, 3)
    return y.reshape(*y.shape[:3], -1, *y.shape[5:])


def _block_forward(options, section, q_start, k_start, q, k, v, extras):
    """(out, lse) in float32 of one block of queries."""
    b, kv, g, _, h = q.shape
    q = _rows(q, q_start, section.size, 3).reshape(b, kv, -1, h)
    k = _rows(k, k_start, section.span, 2)
    v = _rows(v, k_start, section.span, 2)
    s = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=F32)
    s = _soften(options, s)
    s = s.reshape(b, kv, g, section.size, section.span)
    distance, visible = _mask(options, section, q_start, k_start, extras)
    if extras.alibi_n is not None:
        s -= extras.alibi_n.astype(F32).reshape(kv, g, 1, 1) * distance[:, None, None]
    if visible is not None:
        s = jnp.where(visible[:, None, None], s, HIDDEN)
    top = jnp.max(s, axis=-1, keepdims=True)
    if extras.sinks_n is not None:
        sinks = extras.sinks_n.astype(F32).reshape(kv, g, 1, 1)
        top = jnp.maximum(top, sinks)
    p = jnp.exp(s - top)
    total = jnp.sum(p, axis=-1, keepdims=True)
    if extras.sinks_n is not None:
        total += jnp.exp(sinks - top)
    out = jnp.einsum(
        "bkts,bksh->bkth",
        p.reshape(b, kv, -1, section.span).astype(v.dtype),
        v,
        preferred_element_type=F32,
    )
    out = out.reshape(b, kv, g, section.size, -1) / total
    lse = top + jnp.log(total)
    if extras.segments_bt is not None:
        # Only segments can hide all keys of a row: then top is HIDDEN and each weight exp(0).
        seen = top > HIDDEN
        out, lse = jnp.where(seen, out, 0), jnp.where(seen, lse, HIDDEN)
    return out, lse[..., 0]


def _block_backward(options, section, q_start, k_start, sums, rows, k, v, extras):
    """Adds the gradients of one block to `sums`, those of k, v and alibi. Returns (sums, dq), in
    float32."""
    q, dout, delta, lse = rows
    dk, dv, dalibi = sums
    b, kv, g, _, h = q.shape
    q = _rows(q, q_start, section.size, 3).reshape(b, kv, -1, h)
    dout = _rows(dout, q_start, section.size, 3).reshape(b, kv, q.shape[2], -1)
    delta = _rows(delta, q_start, section.size, 3).reshape(b, kv, 1, -1)
    lse = _rows(lse, q_start, section.size, 3).reshape(b, kv, 1, g, -1)
    k = _rows(k, k_start, section.span, 2)
    v = _rows(v, k_start, section.span, 2)

    s = jnp.einsum("bksh,bkth->bkst", k, q, preferred_element_type=F32)
    s = _soften(options, s)
    slope = 1 if options.softcap is None else 1 - (s / options.softcap) ** 2
    p = s.reshape(b, kv, section.span, g, section.size)
    distance, visible = _mask(options, section, q_start, k_start, extras)
    if extras.alibi_n is not None:
        distance = jnp.swapaxes(distance, 1, 2)[:, None, :, None]
        p -= extras.alibi_n.astype(F32).reshape(kv, 1, g, 1) * distance
    p = jnp.exp(p - lse)
    if visible is not None:
        p = jnp.where(jnp.swapaxes(visible, 1, 2)[:, None, :, None], p, 0)
    p = p.reshape(s.shape)
    dp = jnp.einsum("bksh,bkth->bkst", v, dout, preferred_element_type=F32)
    ds = p * (dp - delta)
    if extras.alibi_n is not None:
        by_head = ds.reshape(b, kv, section.span, g, section.size)
        dalibi -= jnp.sum(by_head * distance, axis=(0, 2, 4))
    ds = (ds * (slope * options.scale)).astype(q.dtype)
    p = p.astype(dout.dtype)
    dk = _add_rows(dk, k_start, jnp.einsum("bkst,bkth->bksh", ds, q, preferred_element_type=F32))
    dv = _add_rows(dv, k_start, jnp.einsum("bkst,bkth->bksh", p, dout, preferred_element_type=F32))
    dq = jnp.einsum("bkhs,bkst->bkht", jnp.swapaxes(k, 2, 3), ds, preferred_element_type=F32)
    dq = jnp.swapaxes(dq, 2, 3).reshape(b, kv, g, section.size, h)
    return (dk, dv, dalibi), dq


def _soften(options, s):
    s *= options.scale
    return s if options.softcap is None else options.softcap * jnp.tanh(s / options.softcap)


def _k_start(section, q_start, options, s):
    """Index of the first key of a block."""
    if not section.moving or section.span == s:
        return 0
    return jnp.clip(q_start + section.size - section.span, 0, s - section.span)


def _mask(options, section, q_start, k_start, extras):
    """(distance, visible), each [B or 1, block, span]; visible is None if all keys are."""
    if extras.positions_bt is None:
        index = (q_start + jnp.arange(section.size))[None]
    else:
        index = _rows(extras.positions_bt, q_start, section.size, 1)
    key = k_start + jnp.arange(section.span)
    rank = (
        key[None] if extras.ranks_bs is None else _rows(extras.ranks_bs, k_start, section.span, 1)
    )
    distance = index[:, :, None] - key
    terms = []
    if options.causal:
        terms.append(distance >= 0)
    if options.window is not None:
        near = distance < options.window
        terms.append(near | (rank < options.sink_tokens)[:, None] if options.sink_tokens else near)
    if extras.prefix_b is not None:
        terms = [_all(terms) | (rank < extras.prefix_b[:, None])[:, None]]
    if extras.segments_bt is not None:
        q_segments = _rows(extras.segments_bt, q_start, section.size, 1)
        kv_segments = _rows(extras.kv_segments_bs, k_start, section.span, 1)
        terms.append(q_segments[:, :, None] == kv_segments[:, None])
    return distance, _all(terms)


def _all(terms):
    """Logical and of the terms; None without terms."""
    return functools.reduce(jnp.logical_and, terms) if terms else None


def _rows(x, start, size, axis):
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _add_rows(x, start, more):
    """x with `more` added to its rows (axis 2) from `start` on."""
    if isinstance(start, int) and more.shape == x.shape:
        return x + more
    size = more.shape[2]
    return jax.lax.dynamic_update_slice_in_dim(x, _rows(x, start, size, 2) + more, start, 2)
