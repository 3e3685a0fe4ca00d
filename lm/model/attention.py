"""Grouped-query attention: projections, positions and the key/value cache around
`kernels_pallas.flash_attention`."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

import kernels_pallas
from lm.errors import UserError, check_name, check_positive
from lm.model.norm import Norm
from lm.model.param import Init, add_bias, einsum, param, zeros
from lm.model.rope import ALiBi, NoPosition, RoPE, rotate
from lm.parallel.sharding import context_parallel_size, is_sharded, partition, shard, shard_map


@dataclass(frozen=True, kw_only=True)
class QKNorm:
    """Norms of queries and keys before rotation (Henry et al., arXiv:2010.04245): of each 'head'
    (Qwen 3, Gemma 3), or of the whole 'projection' with all heads as one vector (OLMo 2,
    arXiv:2501.00656)."""

    norm: Norm
    over: str = "head"

    def __post_init__(self) -> None:
        check_name("model.attention.qk_norm.over", self.over, ("head", "projection"))

    def build(self, heads: int, head_dim: int, rngs: nnx.Rngs) -> nnx.Module:
        """The norm of queries or of keys."""
        return self.norm.build(heads * head_dim if self.over == "projection" else head_dim, rngs)


@dataclass(frozen=True, kw_only=True)
class LearnedSinks:
    """One logit per query head that takes part in the softmax and carries no value, so that a head
    may attend to nothing (gpt-oss, arXiv:2508.10925)."""


@dataclass(frozen=True, kw_only=True)
class FirstTokens:
    """The first `count` tokens of each document stay visible beyond the window (Xiao et al.,
    arXiv:2309.17453)."""

    count: int

    def __post_init__(self) -> None:
        check_positive(**{"model.attention.sinks.count": self.count})


@dataclass(frozen=True, kw_only=True)
class GQA:
    """Attention of `heads` query heads over `kv_heads` key/value heads (Ainslie et al.,
    arXiv:2305.13245).

    Args:
      heads, kv_heads, head_dim: query head n reads key/value head n // (heads // kv_heads).
      position: how scores know where tokens stand.
      qk_norm: norms of queries and keys.
      bias, out_bias: biases on queries, keys and values, and on the output.
      softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118).
      window: how many keys up to its own a query sees (Longformer, arXiv:2004.05150; Mistral,
        arXiv:2310.06825).
      sinks: what a head may attend to when it wants to attend to nothing.
      causal: hides later tokens.
      scale: factor on the scores; head_dim ** -0.5 when None.
    """

    heads: int
    kv_heads: int
    head_dim: int
    position: RoPE | ALiBi | NoPosition = field(default_factory=RoPE)
    qk_norm: QKNorm | None = None
    bias: bool = False
    out_bias: bool = False
    softcap: float | None = None
    window: int | None = None
    sinks: LearnedSinks | FirstTokens | None = None
    causal: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        here = "model.attention"
        given = {"softcap": self.softcap, "window": self.window, "scale": self.scale}
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        sizes |= {name: value for name, value in given.items() if value is not None}
        check_positive(**{f"{here}.{name}": value for name, value in sizes.items()})
        if self.heads % self.kv_heads:
            divisors = [k for k in range(1, self.heads + 1) if self.heads % k == 0]
            raise UserError(
                f"{here}.kv_heads={self.kv_heads} does not divide {here}.heads={self.heads}; "
                f"choose one of {', '.join(map(str, divisors))}."
            )
        if self.window is not None and not self.causal:
            raise UserError(
                f"{here}.window={self.window} needs {here}.causal=True; set one of the two."
            )
        if isinstance(self.sinks, FirstTokens) and self.window is None:
            raise UserError(
                f"{here}.sinks={self.sinks} does nothing without {here}.window; "
                "set a window or leave the sinks out."
            )
        if isinstance(self.position, RoPE):
            self.position.check(self.head_dim)

    def build(self, dim: int, rngs: nnx.Rngs, init: Init) -> "Attention":
        return Attention(self, dim, rngs, init)


def MHA(*, heads: int, head_dim: int, **options: Any) -> GQA:
    """Multi-head attention: as many key/value heads as query heads (Vaswani et al.,
    arXiv:1706.03762)."""
    return GQA(heads=heads, kv_heads=heads, head_dim=head_dim, **options)


def MQA(*, heads: int, head_dim: int, **options: Any) -> GQA:
    """Multi-query attention: one key/value head for all (Shazeer, arXiv:1911.02150)."""
    return GQA(heads=heads, kv_heads=1, head_dim=head_dim, **options)


class Positions(NamedTuple):
    """What every layer knows of its tokens.

    segments_bt   document of each token, or None: all one
    slots_bt      with a cache, where each token's key is written and what index its query has; None
                  without
    mask_bt       true on real tokens, false on padding, or None: all real
    tables        cosines and sines of every (RoPE, head width) in the model, computed once for all
                  layers
    """

    segments_bt: jax.Array | None
    slots_bt: jax.Array | None
    mask_bt: jax.Array | None
    tables: dict[tuple[RoPE, int], tuple[jax.Array, jax.Array]]


class Cache(NamedTuple):
    """Keys and values [B, S, K, H], or those of a stack of layers [L, B, S, K, H] with the `layer`
    that is meant."""

    k: jax.Array
    v: jax.Array
    layer: jax.Array | None

    def write(self, k_btkh: jax.Array, v_btkh: jax.Array, slots_bt: jax.Array) -> "Cache":
        """Row b's keys and values at its own slots, in place inside a compiled loop. A slot beyond
        S writes nothing."""
        rows = jnp.arange(slots_bt.shape[0])[:, None]
        at = (rows, slots_bt) if self.layer is None else (self.layer, rows, slots_bt)
        k = self.k.at[at].set(k_btkh.astype(self.k.dtype), mode="drop")
        return self._replace(k=k, v=self.v.at[at].set(v_btkh.astype(self.v.dtype), mode="drop"))

    def read(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """All slots of this layer, written or not."""
        k, v = (self.k, self.v) if self.layer is None else (self.k[self.layer], self.v[self.layer])
        return k.astype(dtype), v.astype(dtype)


class Attention(nnx.Module):
    """x_btd -> y_btd."""

    def __init__(self, config: GQA, dim: int, rngs: nnx.Rngs, init: Init):
        self.config = c = config
        n, k, h = c.heads, c.kv_heads, c.head_dim
        reads_q, reads_kv = init.reads(dim, n * h), init.reads(dim, k * h)
        self.q = param(rngs, (dim, n, h), ("embed", "heads", "head"), reads_q)
        self.k = param(rngs, (dim, k, h), ("embed", "kv_heads", "head"), reads_kv)
        self.v = param(rngs, (dim, k, h), ("embed", "kv_heads", "head"), reads_kv)
        self.o = param(rngs, (n, h, dim), ("heads", "head", "embed"), init.writes(n * h, dim))
        self.q_bias = param(rngs, (n, h), ("heads", "head"), zeros) if c.bias else None
        self.k_bias = param(rngs, (k, h), ("kv_heads", "head"), zeros) if c.bias else None
        self.v_bias = param(rngs, (k, h), ("kv_heads", "head"), zeros) if c.bias else None
        self.o_bias = param(rngs, (dim,), ("norm",), zeros) if c.out_bias else None
        sinks = isinstance(c.sinks, LearnedSinks)
        self.sinks = param(rngs, (n,), ("heads",), zeros) if sinks else None
        self.q_norm = c.qk_norm.build(n, h, rngs) if c.qk_norm else None
        self.k_norm = c.qk_norm.build(k, h, rngs) if c.qk_norm else None

    def __call__(
        self, x_btd: jax.Array, positions: Positions, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        q_btnh = add_bias(einsum("btd,dnh->btnh", x_btd, self.q), self.q_bias)
        k_btkh = add_bias(einsum("btd,dkh->btkh", x_btd, self.k), self.k_bias)
        v_btkh = add_bias(einsum("btd,dkh->btkh", x_btd, self.v), self.v_bias)
        if c.qk_norm:
            q_btnh, k_btkh = self._norm(q_btnh, self.q_norm), self._norm(k_btkh, self.k_norm)
        if isinstance(c.position, RoPE):
            table = positions.tables[c.position, c.head_dim]
            q_btnh, k_btkh = rotate(q_btnh, table), rotate(k_btkh, table)
        q_btnh = shard(q_btnh, "batch", "seq", "heads", "head")
        k_bskh, v_bskh = k_btkh, v_btkh
        if cache is not None:
            cache = cache.write(k_btkh, v_btkh, positions.slots_bt)
            k_bskh, v_bskh = cache.read(q_btnh.dtype)
        k_bskh = shard(k_bskh, "batch", "seq", "kv_heads", "head")
        v_bskh = shard(v_bskh, "batch", "seq", "kv_heads", "head")
        of_heads = {
            "sinks": None if self.sinks is None else self.sinks[...],
            "alibi": jnp.asarray(c.position.slopes(c.heads))
            if isinstance(c.position, ALiBi)
            else None,
        }
        out_btnh = _attend(
            *(q_btnh, k_bskh, v_bskh),
            of_heads,
            {"segment_ids": positions.segments_bt, "positions": positions.slots_bt},
            causal=c.causal,
            window=c.window,
            sink_tokens=c.sinks.count if isinstance(c.sinks, FirstTokens) else 0,
            softcap=c.softcap,
            scale=c.scale,
        )
        out_btnh = shard(out_btnh, "batch", "seq", "heads", "head")
        out_btd = add_bias(einsum("btnh,nhd->btd", out_btnh, self.o), self.o_bias)
        out_btd = shard(out_btd, "batch", "stream", "embed")
        return checkpoint_name(out_btd, "attention_out"), cache

    def _norm(self, x_btnh: jax.Array, norm: Any) -> jax.Array:
        if self.config.qk_norm.over == "head":
            return norm(x_btnh)
        b, t, n, h = x_btnh.shape
        return norm(x_btnh.reshape(b, t, n * h)).reshape(b, t, n, h)


def _attend(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    of_heads: dict[str, jax.Array | None],
    of_tokens: dict[str, jax.Array | None],
    **options: Any,
) -> jax.Array:
    """Each device takes its own rows and heads, since a TPU kernel is not partitioned by the
    compiler. Where rows are split, its queries meet the keys of the others too."""
    n, kv_heads = q_btnh.shape[2], k_bskh.shape[2]
    of_heads = {name: x for name, x in of_heads.items() if x is not None}
    of_tokens = {name: x for name, x in of_tokens.items() if x is not None}
    attention = kernels_pallas.flash_attention
    if context_parallel_size() > 1:
        stay = partition(k_bskh.shape, "batch", "keys", "kv_heads", "head")[1]
        ring = stay and not options["sink_tokens"]
        form = kernels_pallas.ring_attention if ring else kernels_pallas.gathered_attention
        attention = partial(form, axis_name="context")

    def local(q_btnh, k_bskh, v_bskh, of_heads, of_tokens):
        if k_bskh.shape[2] * n != q_btnh.shape[2] * kv_heads:
            # More devices than key/value heads: each has them all and takes the one it reads.
            first = jax.lax.axis_index(heads) * q_btnh.shape[2] * kv_heads // n
            k_bskh, v_bskh = (
                jax.lax.dynamic_slice_in_dim(x, first, 1, axis=2) for x in (k_bskh, v_bskh)
            )
        return attention(q_btnh, k_bskh, v_bskh, **of_heads, **of_tokens, **options)

    if not is_sharded():
        return local(q_btnh, k_bskh, v_bskh, of_heads, of_tokens)
    q_spec = partition(q_btnh.shape, "batch", "seq", "heads", "head")
    kv_spec = partition(k_bskh.shape, "batch", "seq", "kv_heads", "head")
    heads = q_spec[2]
    in_specs = (
        q_spec,
        kv_spec,
        kv_spec,
        dict.fromkeys(of_heads, PartitionSpec(heads)),
        dict.fromkeys(of_tokens, PartitionSpec(*q_spec[:2])),
    )
    mapped = shard_map(local, in_specs, q_spec)
    return mapped(q_btnh, k_bskh, v_bskh, of_heads, of_tokens)
