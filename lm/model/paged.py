"""A paged key/value cache: keys and values in pages of a fixed number of slots that sequences share
(PagedAttention, Kwon et al., arXiv:2309.06180).

Slot s of the page table[b, i] holds position i * S + s of row b. Which pages a row owns is decided
outside (lm.generate.pages); rows may share pages, and several rows may be tokens of one sequence.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import kernels_pallas
from lm.model.cache import Cache
from lm.parallel.sharding import is_sharded, partition, shard, shard_map

LARGEST_INT8 = 127


class Pages(NamedTuple):
    """The arguments of `kernels_pallas.paged_attention` after the queries."""

    k_pksh: jax.Array
    v_pksh: jax.Array
    table_bp: jax.Array
    lengths_b: jax.Array
    scales: tuple[jax.Array, jax.Array] | None


# attend(q_btnh, pages) -> out_btnh, where the last query of row b is its token lengths_b[b] - 1.
AttendPages = Callable[[jax.Array, Pages], jax.Array]


@dataclasses.dataclass(frozen=True)
class Paged(Cache):
    """Pages [P, K, S, H] of one layer, or [L, P, K, S, H] of a stack of layers.

    scales    of int8 pages, for keys and values, [P, K, S]; () for other formats
    table_bp  the pages of each row; set it before a call
    reach     (window, sink tokens) of the layers; None: they see all positions
    """

    scales: tuple[jax.Array, ...] = ()
    table_bp: jax.Array | None = None
    reach: tuple[int, int] | None = None

    @classmethod
    def empty(
        cls,
        stack: tuple[int, ...],
        shape: tuple[int, int, int, int],
        dtype: Any,
        reach: tuple[int, int] | None,
    ) -> Self:
        """`shape` is (P, K, S, H), and `stack` the leading axes."""
        k, v = (jnp.zeros((*stack, *shape), dtype) for _ in range(2))
        is_int8 = jnp.dtype(dtype) == jnp.int8
        scales = tuple(jnp.zeros((*stack, *shape[:3]), jnp.float32) for _ in range(2))
        return cls(k, v, scales=scales if is_int8 else (), reach=reach)

    def attend(
        self,
        q_btnh: jax.Array,
        k_btkh: jax.Array,
        v_btkh: jax.Array,
        positions_bt: jax.Array,
        mask_bt: jax.Array | None,
        attend: AttendPages,
    ) -> tuple[jax.Array, Self]:
        """As `Cache.attend`; `attend` is an AttendPages. Rows without a real token give zeros."""
        *stack, pages, kv_heads, slots, _ = self.k.shape
        first = 0 if self.layer is None else self.layer * pages
        # With more devices than key/value heads, heads are stored once per device.
        k_btkh, v_btkh = (_repeated(x, kv_heads) for x in (k_btkh, v_btkh))
        table_bp = self.table_bp + first
        at_bt = jnp.take_along_axis(table_bp, positions_bt // slots, axis=1, mode="clip")
        if mask_bt is not None:
            outside = pages * (stack[0] if stack else 1)
            at_bt = jnp.where(mask_bt, at_bt, outside)
        cache = self._store_pages(k_btkh, v_btkh, at_bt, positions_bt % slots)
        lengths_b = positions_bt[:, 0] + positions_bt.shape[1]
        if mask_bt is not None:
            lengths_b = jnp.where(jnp.any(mask_bt, axis=1), lengths_b, 0)
        k, v, *scales = (_flat(x, len(stack)) for x in cache._arrays)
        return attend(q_btnh, Pages(k, v, table_bp, lengths_b, tuple(scales) or None)), cache

    @property
    def _arrays(self) -> tuple[jax.Array, ...]:
        return self.k, self.v, *self.scales

    def _store_pages(
        self, k_btkh: jax.Array, v_btkh: jax.Array, page_bt: jax.Array, slot_bt: jax.Array
    ) -> Self:
        """Writes each token in place. A page outside the cache writes nothing."""
        new = k_btkh, v_btkh
        if self.scales:
            (k_btkh, k_scale), (v_btkh, v_scale) = _quantized(k_btkh), _quantized(v_btkh)
            new = k_btkh, v_btkh, k_scale, v_scale
        pages = tuple(_flat(x, self.k.ndim - 4) for x in self._arrays)
        rows = (x.reshape(-1, *x.shape[2:]) for x in new)
        written = _write(pages, tuple(rows), page_bt.reshape(-1), slot_bt.reshape(-1))
        k, v, *scales = (x.reshape(old.shape) for x, old in zip(written, self._arrays))
        return dataclasses.replace(self, k=k, v=v, scales=tuple(scales))


jax.tree_util.register_dataclass(Paged, ["k", "v", "layer", "scales", "table_bp"], ["reach"])


def _flat(x: jax.Array, stack: int) -> jax.Array:
    """[L, P, ...] -> [L P, ...]"""
    return x.reshape(-1, *x.shape[2:]) if stack else x


def _write(
    pages: tuple[jax.Array, ...], new: tuple[jax.Array, ...], page_r: jax.Array, slot_r: jax.Array
) -> tuple[jax.Array, ...]:
    """`kernels_pallas.write_pages`; on a mesh each device writes its heads of all rows."""
    if not is_sharded():
        return kernels_pallas.write_pages(pages, new, page_r, slot_r)
    heads = partition(pages[0].shape, "norm", "kv_heads", "norm", "head")[1]
    of_heads = (PartitionSpec(None, heads),) * len(pages)
    specs = of_heads, of_heads, PartitionSpec(), PartitionSpec()
    return shard_map(kernels_pallas.write_pages, specs, of_heads)(pages, new, page_r, slot_r)


def _repeated(x_btkh: jax.Array, heads: int) -> jax.Array:
    """On a mesh, the new keys of all rows on every device that shares their heads."""
    x_btkh = jnp.repeat(x_btkh, heads // x_btkh.shape[2], axis=2)
    return shard(x_btkh, "norm", "norm", "kv_heads", "head")


def _quantized(x_btkh: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [B, T, K, H] with one scale per token and head, [B, T, K]."""
    x_btkh = x_btkh.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x_btkh), axis=-1) / LARGEST_INT8
    safe = jnp.where(scale == 0, 1, scale)
    return jnp.round(x_btkh / safe[..., None]).astype(jnp.int8), scale
