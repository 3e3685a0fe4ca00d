"""What both TPU kernels share: the loop over the chunks of keys that a block of queries meets, and
the mask of those that it sees in part."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.ranges import FIELDS, FULL_HIGH, FULL_LOW, HEAD, HIGH, LOW

LANES = 128


def row_of(table_ref: Any, masks: Any, b: Any, i: Any, blocks: int) -> list[Any]:
    """The five numbers of query block i."""
    start = ((b if masks.by_row else 0) * blocks + i) * len(FIELDS)
    return [table_ref[start + field] for field in FIELDS]


def nearest_block(row: list[Any], j: Any, chunks: int) -> Any:
    """Key block j if any of it is seen, else one that is: what is skipped is not loaded."""
    # None is negative; jnp's floor division would ask for the chip's name.
    low = jax.lax.div(row[LOW], chunks)
    high = jax.lax.div(jnp.maximum(row[HIGH] - 1, 0), chunks)
    return jnp.where(j * chunks < row[HEAD], j, jnp.clip(j, low, high))


def is_live(row: list[Any], j: Any, chunks: int) -> Any:
    """Whether any of key block j is seen."""
    low, high = j * chunks, (j + 1) * chunks
    return (low < row[HEAD]) | (jnp.maximum(low, row[LOW]) < jnp.minimum(high, row[HIGH]))


class Reach(NamedTuple):
    """What a block of queries sees of one key block, in chunks from its start: `ranges`."""

    head: Any
    low: Any
    full_low: Any
    full_high: Any
    high: Any

    def last(self) -> Any:
        """A chunk of which something is seen, if there is any."""
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
        """The same with no chunk seen whole."""
        return self._replace(full_low=self.low, full_high=self.low)


def reach(row: list[Any], j: Any, chunks: int) -> Reach:
    """What is seen of key block j."""
    fields = (HEAD, LOW, FULL_LOW, FULL_HIGH, HIGH)
    return Reach(*(jnp.clip(row[field] - j * chunks, 0, chunks) for field in fields))


def for_each_chunk(seen: Reach, ratio: int, whole: Callable, part: Callable) -> None:
    """whole(chunk) for each run of `ratio` chunks that are seen whole, and part(chunk) for each
    other that may be seen."""
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


def visible(options, masks, prefix, q_index, k_index, q_segments, k_segments, ranks) -> Any:
    """The mask; what is of queries and what is of keys broadcast against each other."""
    seen = k_index < masks.keys
    inside = None
    if options.causal:
        inside = k_index <= q_index
    if options.window is not None:
        near = q_index - k_index < options.window
        if options.sink_tokens:
            near |= ranks < options.sink_tokens
        inside &= near
    if prefix is not None:
        inside |= ranks < prefix
    if inside is not None:
        seen = seen & inside
    if q_segments is not None:
        seen &= q_segments == k_segments
    return jnp.broadcast_to(seen, jnp.broadcast_shapes(q_index.shape, k_index.shape))


def as_column(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, 1], n a multiple of the lanes."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))[:, :1]


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over one axis of each, in float32; of float32 at full precision."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
