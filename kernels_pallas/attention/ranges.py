"""Ranges of key chunks that each block of queries attends to.

Kernels skip chunks in which no key is visible and apply no mask to chunks that are fully visible.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# For each block of queries: chunks 0..HEAD-1 and LOW..HIGH-1 may contain visible keys; in chunks
# FULL_LOW..FULL_HIGH-1 every key is visible to every query.
HEAD, LOW, FULL_LOW, FULL_HIGH, HIGH = FIELDS = range(5)


def ranges(
    options: Any, extras: Any, t: int, s: int, *, rows: int, chunk: int, by_keys: bool = False
) -> Any:
    """Table of the five FIELDS for each block of queries, [B or 1, blocks, 5] int32.

    A numpy array if the ranges depend on lengths alone. Segment ids and positions may come in any
    order; unsorted ones give correct but wider ranges.

    Args:
      options, extras: `Options` and `Extras` of blocked.py.
      t, s: numbers of queries and keys.
      rows: queries per block.
      chunk: keys per chunk.
      by_keys: return the transposed table: for each chunk of keys, the blocks of queries.
    """
    arrays = extras.segments_bt, extras.positions_bt, extras.prefix_b
    xp = np if all(array is None for array in arrays) else jnp
    blocks, chunks = -(-t // rows), -(-s // chunk)
    key_first = np.arange(chunks) * chunk
    key_last = np.minimum(key_first + chunk, s) - 1
    place = xp.arange(t)[None] if extras.positions_bt is None else extras.positions_bt
    q_low, q_high = (x[..., None] for x in _extremes(place, rows, xp))
    ranks = xp.arange(s)[None] if extras.ranks_bs is None else extras.ranks_bs
    rank_low, rank_high = (x[:, None] for x in _extremes(ranks, chunk, xp))

    some = xp.ones((1, blocks, chunks), bool)
    every = some & (key_first + chunk <= s)
    if options.causal:
        some = some & (key_first <= q_high)
        every = every & (key_last <= q_low)
    if options.window is not None:
        sink = options.sink_tokens
        some = some & ((q_low - key_last < options.window) | (rank_low < sink))
        every = every & ((q_high - key_first < options.window) | (rank_high < sink))
    if extras.prefix_b is not None:
        prefix = extras.prefix_b[:, None, None]
        some = some | (rank_low < prefix)
        every = every | ((rank_high < prefix) & (key_first + chunk <= s))
    if extras.segments_bt is not None:
        q_least, q_most = (x[..., None] for x in _extremes(extras.segments_bt, rows, xp))
        k_least, k_most = (x[:, None] for x in _extremes(extras.kv_segments_bs, chunk, xp))
        some = some & (q_least <= k_most) & (k_least <= q_most)
        every = every & (q_least == k_most) & (k_least == q_most)
    if by_keys:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    return _table(some, every, xp)


def _extremes(x, size, xp):
    """Minimum and maximum of each group of `size` numbers along the last axis."""
    short = -x.shape[1] % size
    x = xp.pad(x, [(0, 0), (0, short)], mode="edge").reshape(x.shape[0], -1, size)
    return x.min(-1), x.max(-1)


def _table(some, every, xp):
    """The five FIELDS from [..., chunks] flags: `some` or `every` key of a chunk is visible."""
    chunks = some.shape[-1]
    at = xp.arange(chunks)

    def first(flags, otherwise):
        return xp.where(flags.any(-1), xp.argmax(flags, -1), otherwise)

    head = first(~some, chunks)
    rest = some & (at >= head[..., None])
    more = rest.any(-1)
    low = xp.where(more, xp.argmax(rest, -1), 0)
    high = xp.where(more, chunks - xp.argmax(rest[..., ::-1], -1), head)
    head = xp.where(more, head, 0)
    every = every & some & (at >= low[..., None]) & (at < high[..., None])
    full_low = first(every, low)
    full_high = first(~every & (at >= full_low[..., None]), chunks)
    full_high = xp.where(every.any(-1), full_high, low)
    return xp.stack([head, low, full_low, full_high, high], -1).astype(xp.int32)


def as_table(table: Any) -> jax.Array:
    """The table flattened to one axis, the compact layout for scalar memory."""
    return jnp.asarray(table).reshape(-1)
