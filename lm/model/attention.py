"""Attention layers: `GroupedQueryAttention` and the configs that declare it.

An attention module is called as `attention(x_btd, positions, cache)` and returns (y_btd, cache). To
add your own, subclass `AttentionConfig`.
"""

import abc
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm.errors import UserError, check_name, check_positive, check_size
from lm.model.attention_kernels import attend, attend_pages
from lm.model.cache import Cache, Contiguous, Window
from lm.model.initializers import DEFAULT, Init, normal, zeros
from lm.model.norm import NormConfig
from lm.model.paged import Paged, Pages
from lm.model.param import add_bias, dense, einsum, param
from lm.model.rope import ALiBi, NoPosition, RoPE, rotate
from lm.parallel.sharding import shard


@dataclass(frozen=True, kw_only=True)
class QKNorm:
    """Normalizes queries and keys before rotation (Henry et al., arXiv:2010.04245): over each
    'head' (Qwen 3, Gemma 3), or over the whole 'projection', all heads as one vector (OLMo 2,
    arXiv:2501.00656)."""

    norm: NormConfig
    over: str = "head"

    def __post_init__(self) -> None:
        check_name("model.attention.qk_norm.over", self.over, ("head", "projection"))

    def build(self, heads: int, head_dim: int, rngs: nnx.Rngs) -> nnx.Module:
        """The module that normalizes queries or keys."""
        return self.norm.build(heads * head_dim if self.over == "projection" else head_dim, rngs)


@dataclass(frozen=True, kw_only=True)
class LearnedSinks:
    """One learned logit per query head in the denominator of the softmax, so that a head can attend
    to nothing (gpt-oss, arXiv:2508.10925)."""


@dataclass(frozen=True, kw_only=True)
class FirstTokens:
    """Keeps the first `count` tokens of each document visible outside the window (attention sinks,
    Xiao et al., arXiv:2309.17453)."""

    count: int

    def __post_init__(self) -> None:
        check_positive(**{"model.attention.sinks.count": self.count})


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(abc.ABC):
    """Declares an attention layer. Subclass it as a frozen dataclass to add your own."""

    @abc.abstractmethod
    def build(self, dim: int, rngs: nnx.Rngs, init: Init = DEFAULT) -> Any:
        """The module for model width `dim`. Declare its weights with `param`, whose logical axes
        give their sharding, and multiply by them with `einsum`."""

    def build_prefix(self, tokens: int, std: float, rngs: nnx.Rngs) -> Any:
        """The trained keys and values of `Prefix`, which the module finds in its `kv_prefix`."""
        raise UserError(
            f"model.attention={type(self).__name__}(...) has no build_prefix, which "
            "model.adapter=Prefix(...) needs."
        )

    def rope(self) -> "tuple[RoPE, int] | None":
        """(RoPE, head width) if the layer reads `Positions.tables`, else None."""
        return None

    def init_cache(self, batch: int, length: int, dtype: Any, *stack: int) -> Any:
        """An empty cache for `batch` rows of at most `length` tokens, with leading axes `stack`."""
        raise UserError(
            f"model.attention={type(self).__name__}(...) has no init_cache, which generation needs."
        )

    def reach(self) -> tuple[int, int] | None:
        """(window, sink tokens) that a token sees; None: all earlier positions."""
        return None

    def init_pages(self, pages: Any, slots: int, dtype: Any, ways: int, *stack: int) -> Any:
        """An empty paged cache with leading axes `stack`: pages of `slots` tokens, pages[reach] of
        them, where `reach` is (window, sink tokens) or None. Its heads divide by `ways`."""
        raise UserError(
            f"model.attention={type(self).__name__}(...) has no init_pages, which the engine needs."
        )

    def flops(self, length: int) -> float:
        """Forward FLOPs per token beyond those of the weights, with masked pairs counted."""
        return 0.0

    def train_flops(self, length: int) -> float:
        """FLOPs per token of both passes beyond those of the weights, without masked pairs."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class GQA(AttentionConfig):
    """Grouped-query attention of `heads` query heads over `kv_heads` key/value heads (Ainslie et
    al., arXiv:2305.13245).

    Args:
      heads, kv_heads, head_dim: query head n reads key/value head n // (heads // kv_heads).
      position: positional encoding.
      qk_norm: normalization of queries and keys.
      bias, out_bias: add biases to queries, keys and values; to the output.
      softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118).
      window: sliding window, the number of keys that a query sees, its own included (Longformer,
        arXiv:2004.05150; Mistral, arXiv:2310.06825).
      sinks: attention sinks.
      causal: mask later tokens.
      scale: factor on the scores; None: head_dim ** -0.5.
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
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        sizes |= {} if self.window is None else {"window": self.window}
        check_size(**{f"{here}.{name}": value for name, value in sizes.items()})
        given = {"softcap": self.softcap, "scale": self.scale}
        check_positive(**{f"{here}.{n}": value for n, value in given.items() if value is not None})
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

    def build(self, dim: int, rngs: nnx.Rngs, init: Init = DEFAULT) -> "GroupedQueryAttention":
        return GroupedQueryAttention(self, dim, rngs=rngs, init=init)

    def build_prefix(self, tokens: int, std: float, rngs: nnx.Rngs) -> "KeyValuePrefix":
        return KeyValuePrefix(self, tokens, std, rngs=rngs)

    def rope(self) -> tuple[RoPE, int] | None:
        return (self.position, self.head_dim) if isinstance(self.position, RoPE) else None

    @property
    def sink_tokens(self) -> int:
        """First tokens that stay visible outside the window."""
        return self.sinks.count if isinstance(self.sinks, FirstTokens) else 0

    def _check_causal(self) -> None:
        if not self.causal:
            raise UserError(
                "model.attention.causal=False cannot generate from a cache; use causal=True."
            )

    def init_cache(self, batch: int, length: int, dtype: Any, *stack: int) -> Cache:
        self._check_causal()
        shape = (*stack, batch, self.kv_heads, self.head_dim)
        sinks = self.sink_tokens
        # ALiBi needs the distance to the sinks, which the ring buffer does not keep.
        keeps_distance = not (sinks and isinstance(self.position, ALiBi))
        if self.window is not None and sinks + self.window < length and keeps_distance:
            return Window.empty(shape, self.window, sinks, dtype)
        return Contiguous.empty(shape, length, dtype)

    def reach(self) -> tuple[int, int] | None:
        if self.window is None:
            return None
        return self.window, self.sink_tokens

    def init_pages(self, pages: Any, slots: int, dtype: Any, ways: int, *stack: int) -> Paged:
        self._check_causal()
        heads = math.lcm(self.kv_heads, ways) if ways > self.kv_heads else self.kv_heads
        shape = (pages[self.reach()], heads, slots, self.head_dim)
        return Paged.empty(stack, shape, dtype, self.reach())

    def flops(self, length: int) -> float:
        return 4 * self.heads * self.head_dim * length

    def train_flops(self, length: int) -> float:
        return 12 * self.heads * self.head_dim * self._mean_keys(length)

    def _mean_keys(self, length: int) -> float:
        """Keys that a query sees, on average."""
        if not self.causal:
            return length
        window = min(self.window or length, length)
        return window * (1 - window / (2 * length))


def MHA(*, heads: int, head_dim: int, **options: Any) -> GQA:
    """Multi-head attention: as many key/value heads as query heads (Vaswani et al.,
    arXiv:1706.03762)."""
    return GQA(heads=heads, kv_heads=heads, head_dim=head_dim, **options)


def MQA(*, heads: int, head_dim: int, **options: Any) -> GQA:
    """Multi-query attention: one key/value head for all (Shazeer, arXiv:1911.02150)."""
    return GQA(heads=heads, kv_heads=1, head_dim=head_dim, **options)


class Positions(NamedTuple):
    """Positions of the tokens, shared by all layers.

    segments_bt   document of each token, or None: one document per row
    positions_bt  with a cache, the position of each token in its sequence; None without
    mask_bt       true on real tokens, false on padding, or None: all real
    tables        {(RoPE, head width): (cosines, sines)} of every RoPE in the model
    """

    segments_bt: jax.Array | None = None
    positions_bt: jax.Array | None = None
    mask_bt: jax.Array | None = None
    tables: dict[tuple[RoPE, int], tuple[jax.Array, jax.Array]] | None = None

    def table(self, rope: RoPE, head_dim: int, length: int) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines [B or 1, T, 1, R/2]; of positions 0..T-1 if none were prepared."""
        if self.tables is not None:
            return self.tables[rope, head_dim]
        return rope.table(jnp.arange(length)[None], head_dim)


class GroupedQueryAttention(nnx.Module):
    """x_btd -> (y_btd, cache). Weights: q [D, N, H], k and v [D, K, H], o [N, H, D].

    attention = GroupedQueryAttention(GQA(heads=4, kv_heads=2, head_dim=16), 64, rngs=rngs)
    y_btd, _ = attention(x_btd)
    """

    kv_prefix: "KeyValuePrefix | None" = None  # TransformerBlock sets it for model.adapter=Prefix

    def __init__(self, config: GQA, dim: int, *, rngs: nnx.Rngs, init: Init = DEFAULT):
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
        self,
        x_btd: jax.Array,
        positions: Positions = Positions(),  # noqa: B008
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        q_btnh = add_bias(einsum("btd,dnh->btnh", x_btd, self.q), self.q_bias)
        k_btkh = add_bias(einsum("btd,dkh->btkh", x_btd, self.k), self.k_bias)
        v_btkh = add_bias(einsum("btd,dkh->btkh", x_btd, self.v), self.v_bias)
        if c.qk_norm:
            q_btnh, k_btkh = self._norm(q_btnh, self.q_norm), self._norm(k_btkh, self.k_norm)
        if isinstance(c.position, RoPE):
            table = positions.table(c.position, c.head_dim, x_btd.shape[1])
            q_btnh, k_btkh = rotate(q_btnh, table), rotate(k_btkh, table)
        q_btnh = shard(q_btnh, "batch", "seq", "heads", "head")
        if cache is None:
            out_btnh = self._attend(q_btnh, k_btkh, v_btkh, None, positions.segments_bt)
        else:
            form = self._attend_pages if isinstance(cache, Paged) else self._attend
            out_btnh, cache = cache.attend(
                *(q_btnh, k_btkh, v_btkh, positions.positions_bt, positions.mask_bt), form
            )
        out_btnh = shard(out_btnh, "batch", "seq", "heads", "head")
        out_btd = add_bias(einsum("btnh,nhd->btd", out_btnh, self.o), self.o_bias)
        out_btd = shard(out_btd, "batch", "stream", "embed")
        return checkpoint_name(out_btd, "attention_out"), cache

    def _attend(
        self,
        q_btnh: jax.Array,
        k_bskh: jax.Array,
        v_bskh: jax.Array,
        index_bt: jax.Array | None,
        segments_bt: jax.Array | None = None,
    ) -> jax.Array:
        """Attention of queries at `index_bt` among the keys; None: at 0..T-1."""
        out = attend(
            q_btnh,
            shard(k_bskh, "batch", "seq", "kv_heads", "head"),
            shard(v_bskh, "batch", "seq", "kv_heads", "head"),
            self._of_heads(),
            {"segment_ids": segments_bt, "positions": index_bt},
            causal=self.config.causal,
            **self._options(),
        )
        return out if self.kv_prefix is None else self.kv_prefix(q_btnh, *out)

    def _attend_pages(self, q_btnh: jax.Array, pages: Pages) -> jax.Array:
        """Attention of queries to the keys in the pages of their rows."""
        out = attend_pages(q_btnh, pages, self._of_heads(), **self._options())
        return out if self.kv_prefix is None else self.kv_prefix(q_btnh, *out)

    def _of_heads(self) -> dict[str, jax.Array]:
        """The [N] arrays of the attention kernels."""
        c, arrays = self.config, {}
        if self.sinks is not None:
            arrays["sinks"] = dense(self.sinks)
        if isinstance(c.position, ALiBi):
            arrays["alibi"] = jnp.asarray(c.position.slopes(c.heads))
        return arrays

    def _options(self) -> dict[str, Any]:
        """The other options of the attention kernels."""
        c = self.config
        return {
            "window": c.window,
            "sink_tokens": c.sink_tokens,
            "softcap": c.softcap,
            "scale": c.scale,
            "return_lse": self.kv_prefix is not None,
        }

    def _norm(self, x_btnh: jax.Array, norm: Any) -> jax.Array:
        if self.config.qk_norm.over == "head":
            return norm(x_btnh)
        b, t, n, h = x_btnh.shape
        return norm(x_btnh.reshape(b, t, n * h)).reshape(b, t, n, h)


class KeyValuePrefix(nnx.Module):
    """Lets queries attend to M trained keys too: (q_btnh, out_btnh, lse_btn) -> out_btnh.

    Weights: k and v [M, K, H].
    """

    def __init__(self, config: GQA, tokens: int, std: float, *, rngs: nnx.Rngs):
        self.config, shape = config, (tokens, config.kv_heads, config.head_dim)
        self.k = param(rngs, shape, ("norm", "kv_heads", "head"), normal(std))
        self.v = param(rngs, shape, ("norm", "kv_heads", "head"), normal(std))

    def __call__(self, q_btnh: jax.Array, out_btnh: jax.Array, lse_btn: jax.Array) -> jax.Array:
        """`out` and `lse` are the attention over the other keys and the log of its denominator."""
        c, group = self.config, self.config.heads // self.config.kv_heads
        k_mnh, v_mnh = (
            jnp.repeat(dense(x).astype(jnp.float32), group, axis=1) for x in (self.k, self.v)
        )
        scale = c.head_dim**-0.5 if c.scale is None else c.scale
        scores_btnm = scale * jnp.einsum("btnh,mnh->btnm", q_btnh.astype(jnp.float32), k_mnh)
        if c.softcap is not None:
            scores_btnm = c.softcap * jnp.tanh(scores_btnm / c.softcap)
        own_btn = jax.nn.logsumexp(scores_btnm, axis=-1)
        more_btnh = jnp.einsum("btnm,mnh->btnh", jax.nn.softmax(scores_btnm, axis=-1), v_mnh)
        share_btn1 = jax.nn.sigmoid(own_btn - lse_btn)[..., None]
        out = out_btnh.astype(jnp.float32) * (1 - share_btn1) + more_btnh * share_btn1
        return out.astype(out_btnh.dtype)
