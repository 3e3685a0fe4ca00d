"""Shared by both TPU kernels: the loop over the chunks of keys that a block of queries attends to,
and the mask of partly visible chunks. Scores are [keys, queries]."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.blocked import Extras, Options
from kernels_pallas.attention.blocks import LANES, Sizes
from kernels_pallas.attention.ranges import (
    FIELDS,
    FULL_HIGH,
    FULL_LOW,
    HEAD,
    HIGH,
    LOW,
    as_table,
    ranges,
)

LOG2E = math.log2(math.e)


class Masks(NamedTuple):
    """Data of the masks.

    table       `ranges`, flattened
    by_row      whether the table has an entry per row of the batch
    keys        number of keys without padding
    prefix_b    see `flash_attention`
    q_segments, positions  [B, blocks, 1, rows], repeated for each of `Sizes.together` heads
    k_segments, ranks      [B, chunks, 1, narrow]
    """

    table: jax.Array
    by_row: bool
    keys: int
    prefix_b: jax.Array | None
    q_segments: jax.Array | None
    positions: jax.Array | None
    k_segments: jax.Array | None
    ranks: jax.Array | None


def masks_of(options: Options, extras: Extras, b: int, t: int, s: int, sizes: Sizes) -> Masks:
    """Masks for B rows of T queries and S keys."""
    table = ranges(options, extras, t, s, rows=sizes.rows, chunk=sizes.narrow)
    positions_bt = extras.positions_bt
    if positions_bt is None and sizes.together > 1:
        # Heads share lanes, so the query index does not follow from the lane.
        positions_bt = jnp.broadcast_to(jnp.arange(t), (b, t))

    def of_queries(x_bt):
        x = pad(x_bt, 1, sizes.rows).reshape(b, -1, 1, sizes.rows)
        return jnp.tile(x, sizes.together)

    def of_keys(x_bs):
        return pad(x_bs, 1, sizes.block).reshape(b, -1, 1, sizes.narrow)

    def maybe(function, x):
        return None if x is None else function(x.astype(jnp.int32))

    return Masks(
        table=as_table(table),
        by_row=table.shape[0] > 1,
        keys=s,
        prefix_b=maybe(lambda x: x, extras.prefix_b),
        q_segments=maybe(of_queries, extras.segments_bt),
        positions=maybe(of_queries, positions_bt),
        k_segments=maybe(of_keys, extras.kv_segments_bs),
        ranks=maybe(of_keys, extras.ranks_bs),
    )


def operands(masks: Masks, sizes: Sizes, of_queries: Callable, of_keys: Callable) -> dict[str, Any]:
    """Kernel operands of the masks other than the table: {name: (array, BlockSpec)}.

    `of_queries` and `of_keys` map grid indices to (row of the batch, block).
    """
    at_queries = pl.BlockSpec(
        (1, 1, 1, sizes.rows * sizes.together), lambda *at: (*of_queries(*at), 0, 0)
    )
    at_keys = pl.BlockSpec(
        (1, sizes.block // sizes.narrow, 1, sizes.narrow), lambda *at: (*of_keys(*at), 0, 0)
    )
    every = {
        "prefix": (masks.prefix_b, pl.BlockSpec(memory_space=pltpu.SMEM)),
        "q_segments": (masks.q_segments, at_queries),
        "positions": (masks.positions, at_queries),
        "k_segments": (masks.k_segments, at_keys),
        "ranks": (masks.ranks, at_keys),
    }
    return {name: pair for name, pair in every.items() if pair[0] is not None}


def row_of(table_ref: Any, masks: Masks, b: Any, i: Any, blocks: int) -> list[Any]:
    """The five FIELDS of query block i."""
    start = ((b if masks.by_row else 0) * blocks + i) * len(FIELDS)
    return [table_ref[start + field] for field in FIELDS]


def nearest_block(row: list[Any], j: Any, chunks: int) -> Any:
    """Key block j if any of it is visible, else the nearest that is, so that no block is loaded
    only to be skipped."""
    # lax.div, as no operand is negative: jnp's floor division queries the chip's name.
    low = jax.lax.div(row[LOW], chunks)
    high = jax.lax.div(jnp.maximum(row[HIGH] - 1, 0), chunks)
    return jnp.where(j * chunks < row[HEAD], j, jnp.clip(j, low, high))


def is_live(row: list[Any], j: Any, chunks: int) -> Any:
    """Whether any chunk of key block j may be visible."""
    low, high = j * chunks, (j + 1) * chunks
    return (low < row[HEAD]) | (jnp.maximum(low, row[LOW]) < jnp.minimum(high, row[HIGH]))


class Reach(NamedTuple):
    """Ranges of visible chunks in one key block, counted from its start; see ranges.py."""

    head: Any
    low: Any
    full_low: Any
    full_high: Any
    high: Any

    def last(self) -> Any:
        """The last chunk that may be visible; -1 if there is none."""
        return jnp.where(self.high > self.low, self.high, self.head) - 1

    def without_last(self) -> "Reach":
        more = self.high > self.low
        high = jnp.where(more, self.high - 1, self.high)
        return Reach(
            jnp.where(more, self.head, jnp.maximum(self.head - 1, 0)),
            self.low,
            jnp.minimum(self.full_low, high),
            jnp.minimum(self.full_high, high),
            high,
        )

    def all_in_part(self) -> "Reach":
        """The same ranges with every chunk treated as partly visible."""
        return self._replace(full_low=self.low, full_high=self.low)


def reach(row: list[Any], j: Any, chunks: int) -> Reach:
    """Reach of key block j, from the five FIELDS of a block of queries."""
    fields = (HEAD, LOW, FULL_LOW, FULL_HIGH, HIGH)
    return Reach(*(jnp.clip(row[field] - j * chunks, 0, chunks) for field in fields))


def for_each_chunk(seen: Reach, ratio: int, whole: Callable, part: Callable) -> None:
    """Calls whole(chunk) for each run of `ratio` fully visible chunks, and part(chunk) for each
    other chunk that may be visible."""
    wholes = jax.lax.div(seen.full_high - seen.full_low, ratio)
    rest = seen.full_low + wholes * ratio
    parts = seen.head + (seen.full_low - seen.low) + (seen.high - rest)

    def one_whole(i, _):
        whole(seen.full_low + i * ratio)
        return 0

    def one_part(i, _):
        at = i - seen.head + seen.low
        at = jnp.where(at < seen.full_low, at, at - seen.full_low + rest)
        part(jnp.where(i < seen.head, i, at))
        return 0

    jax.lax.fori_loop(0, wholes, one_whole, 0)
    jax.lax.fori_loop(0, parts, one_part, 0)


def factor(options: Options) -> float:
    """Factor from q @ k to base-2 scores, or to the argument of the soft cap."""
    if options.softcap is None:
        return options.scale * LOG2E
    return options.scale / options.softcap


def visible(
    options: Options,
    masks: Masks,
    sizes: Sizes,
    refs: dict[str, Any],
    i: Any,
    chunk: Any,
    local_chunk: Any,
) -> jax.Array:
    """Mask [narrow, heads * rows]: True where the queries of block i see the keys of `chunk`.

    `local_chunk` is the chunk's index in the key block in memory; `refs` are those of `operands`.
    """

    def of_queries(name):
        return refs[name][0, 0] if name in refs else None

    def of_keys(name):
        return as_column(refs[name][0, local_chunk]) if name in refs else None

    q_index = of_queries("positions")
    if q_index is None:
        q_index = i * sizes.rows + jax.lax.broadcasted_iota(jnp.int32, (1, sizes.rows), 1)
    k_index = chunk * sizes.narrow + jax.lax.broadcasted_iota(jnp.int32, (sizes.narrow, 1), 0)
    ranks = of_keys("ranks")
    ranks = k_index if ranks is None else ranks
    seen = k_index < masks.keys
    inside = None
    if options.causal:
        inside = k_index <= q_index
    if options.window is not None:
        near = q_index - k_index < options.window
        if options.sink_tokens:
            near |= ranks < options.sink_tokens
        inside &= near
    if "prefix" in refs:
        inside |= ranks < refs["prefix"][pl.program_id(0)]
    if inside is not None:
        seen = seen & inside
    if "q_segments" in refs:
        seen &= of_queries("q_segments") == of_keys("k_segments")
    seen = jnp.broadcast_to(seen, (sizes.narrow, q_index.shape[1]))
    return jnp.concatenate([seen] * (sizes.heads // sizes.together), axis=1)


def as_column(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, 1], for n a multiple of LANES."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))[:, :1]


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Matmul contracting one axis of each, in float32; at full precision for float32 inputs."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def pad(x: jax.Array, axis: int, multiple: int, fill: Any = 0) -> jax.Array:
    """x padded along `axis` to a multiple of `multiple`."""
    short = -x.shape[axis] % multiple
    widths = [(0, short if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill) if short else x
