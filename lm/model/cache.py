"""Key/value caches of one attention layer, or of a stack of layers.

Every form has one method, `attend`. It adds the keys and values of this call to the cache, and lets
the queries attend to all that they may see. Positions are those of the tokens in their sequence;
where a cache stores a position is its own affair, so rows of a batch may have different lengths.

    Contiguous  a slot for each position up to a maximum length
    Window      a ring buffer: only the last `window` positions, plus the first `sinks`
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp

# attend(q_btnh, k_bskh, v_bskh, index_bt) -> out_btnh. `index` is the place of each query among the
# S keys; a query sees keys up to its own index, within the window of its layer.
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Cache(abc.ABC):
    """Keys and values [B, S, K, H]; of a stack of layers [L, B, S, K, H] with the index `layer` of
    the one in use."""

    k: jax.Array
    v: jax.Array
    layer: jax.Array | None = None

    def at(self, layer: jax.Array | None) -> Self:
        """The cache of one layer of a stack; None for the whole stack."""
        return dataclasses.replace(self, layer=layer)

    @abc.abstractmethod
    def attend(
        self,
        q_btnh: jax.Array,
        k_btkh: jax.Array,
        v_btkh: jax.Array,
        positions_bt: jax.Array,
        mask_bt: jax.Array | None,
        attend: Attend,
    ) -> tuple[jax.Array, Self]:
        """(out_btnh, the cache with this call's keys and values).

        Args:
          q_btnh, k_btkh, v_btkh: of this call's tokens, rotated.
          positions_bt: of these tokens in their sequences, consecutive in each row.
          mask_bt: true on real tokens, whose keys are stored; None: all real. Padding comes last.
          attend: the attention of the layer.
        """

    def _stored(self) -> tuple[jax.Array, jax.Array]:
        """k and v [B, S, K, H] of this layer."""
        return (self.k, self.v) if self.layer is None else (self.k[self.layer], self.v[self.layer])

    def _store(self, k_btkh: jax.Array, v_btkh: jax.Array, slots_bt: jax.Array) -> Self:
        """Writes each token to its row's slot, in place inside a compiled loop. A slot outside the
        cache writes nothing."""
        rows = jnp.arange(slots_bt.shape[0])[:, None]
        at = (rows, slots_bt) if self.layer is None else (self.layer, rows, slots_bt)
        k = self.k.at[at].set(k_btkh.astype(self.k.dtype), mode="drop")
        v = self.v.at[at].set(v_btkh.astype(self.v.dtype), mode="drop")
        return dataclasses.replace(self, k=k, v=v)


def _register(cls: type) -> type:
    meta = [f.name for f in dataclasses.fields(cls) if f.name not in ("k", "v", "layer")]
    return jax.tree_util.register_dataclass(cls, ["k", "v", "layer"], meta)


@_register
@dataclasses.dataclass(frozen=True)
class Contiguous(Cache):
    """Slot s holds position s. Positions beyond the length are not stored."""

    @classmethod
    def empty(cls, shape: tuple[int, ...], length: int, dtype: Any) -> Self:
        """`shape` is (..., B, K, H)."""
        return cls(*_zeros(shape, length, dtype))

    def attend(
        self,
        q_btnh: jax.Array,
        k_btkh: jax.Array,
        v_btkh: jax.Array,
        positions_bt: jax.Array,
        mask_bt: jax.Array | None,
        attend: Attend,
    ) -> tuple[jax.Array, Self]:
        # Padding may be stored: a later real token overwrites it before a query can see it.
        cache = self._store(k_btkh, v_btkh, positions_bt)
        k_bskh, v_bskh = (x.astype(q_btnh.dtype) for x in cache._stored())
        return attend(q_btnh, k_bskh, v_bskh, positions_bt), cache


@_register
@dataclasses.dataclass(frozen=True)
class Window(Cache):
    """The first `sinks` positions, then a ring buffer of the last `window` positions:
    position p >= sinks lies in slot sinks + (p - sinks) % window."""

    window: int = 1
    sinks: int = 0

    @classmethod
    def empty(cls, shape: tuple[int, ...], window: int, sinks: int, dtype: Any) -> Self:
        """`shape` is (..., B, K, H)."""
        return cls(*_zeros(shape, sinks + window, dtype), window=window, sinks=sinks)

    def attend(
        self,
        q_btnh: jax.Array,
        k_btkh: jax.Array,
        v_btkh: jax.Array,
        positions_bt: jax.Array,
        mask_bt: jax.Array | None,
        attend: Attend,
    ) -> tuple[jax.Array, Self]:
        # Lay the stored keys out in order of position and append the new ones, so that the distance
        # of two indices is that of their positions: [sinks][start .. first - 1][new tokens].
        b, t = positions_bt.shape
        first_b1 = positions_bt[:, :1]
        start_b1 = jnp.maximum(first_b1 - self.window, self.sinks)
        order_s = jnp.arange(self.sinks + self.window)
        slots_bs = self._slot(order_s - self.sinks + start_b1)
        slots_bs = jnp.where(order_s < self.sinks, order_s, slots_bs)
        index_bt = jnp.where(
            positions_bt < self.sinks, positions_bt, self.sinks + positions_bt - start_b1
        )
        rows_b1 = jnp.arange(b)[:, None]

        def in_order(stored_bskh: jax.Array, new_btkh: jax.Array) -> jax.Array:
            empty = jnp.zeros((b, t, *stored_bskh.shape[2:]), stored_bskh.dtype)
            keys = jnp.concatenate([stored_bskh[rows_b1, slots_bs], empty], axis=1)
            keys = keys.at[rows_b1, index_bt].set(new_btkh.astype(keys.dtype))
            return keys.astype(q_btnh.dtype)

        k_bskh, v_bskh = map(in_order, self._stored(), (k_btkh, v_btkh))
        out_btnh = attend(q_btnh, k_bskh, v_bskh, index_bt)
        return out_btnh, self._store(k_btkh, v_btkh, self._slots_of(positions_bt, mask_bt))

    def _slot(self, positions: jax.Array) -> jax.Array:
        ring = self.sinks + (positions - self.sinks) % self.window
        return jnp.where(positions < self.sinks, positions, ring)

    def _slots_of(self, positions_bt: jax.Array, mask_bt: jax.Array | None) -> jax.Array:
        """Slots of the tokens to store: the real ones among the last `window`. The others get a
        slot outside the cache."""
        mask_bt = jnp.ones(positions_bt.shape, bool) if mask_bt is None else mask_bt
        last_b1 = jnp.max(jnp.where(mask_bt, positions_bt, -1), axis=1, keepdims=True)
        recent_bt = (positions_bt > last_b1 - self.window) | (positions_bt < self.sinks)
        return jnp.where(mask_bt & recent_bt, self._slot(positions_bt), self.sinks + self.window)


def _zeros(shape: tuple[int, ...], slots: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    *lead, heads, width = shape
    return tuple(jnp.zeros((*lead, slots, heads, width), dtype) for _ in range(2))
