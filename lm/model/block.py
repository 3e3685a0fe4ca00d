"""`TransformerBlock`: attention and feed-forward, each added to the residual stream."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lm.model.attention import Positions
from lm.model.config import Block, Config
from lm.parallel.sharding import shard


class TransformerBlock(nnx.Module):
    """x_btd -> (x_btd, cache, sums): one layer of a model.

        block = TransformerBlock(config, rngs=nnx.Rngs(0))
        x_btd, _, _ = block(x_btd)

    `block` chooses attention and feed-forward; None takes the first layer of `config`. `cache` is
    that of the attention, `sums` the router statistics of a mixture of experts, else None.
    """

    def __init__(self, config: Config, block: Block | None = None, *, rngs: nnx.Rngs):
        block = config.layout.blocks[0] if block is None else block
        self.placement, self.dropout = config.placement, config.dropout
        init = config.init.build(config.layers)
        before = config.placement in ("pre", "sandwich")
        after = config.placement != "pre"
        self.attention_norm = config.norm.build(config.dim, rngs) if before else None
        self.attention = block.attention.build(config.dim, rngs, init)
        self.attention_out_norm = config.norm.build(config.dim, rngs) if after else None
        self.ffn_norm = config.norm.build(config.dim, rngs) if before else None
        self.ffn = block.ffn.build(config.dim, rngs, init)
        self.ffn_out_norm = config.norm.build(config.dim, rngs) if after else None

    def __call__(
        self,
        x_btd: jax.Array,
        positions: Positions = Positions(),  # noqa: B008
        cache: Any = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        h_btd = self._input(x_btd, self.attention_norm)
        h_btd, cache = self.attention(h_btd, positions, cache)
        x_btd = self._add(x_btd, h_btd, self.attention_out_norm, keys[0])
        h_btd = self._input(x_btd, self.ffn_norm)
        output = self.ffn(h_btd, positions.mask_bt)
        h_btd, sums = output if isinstance(output, tuple) else (output, None)
        x_btd = self._add(x_btd, h_btd, self.ffn_out_norm, keys[1])
        return shard_stream(x_btd), cache, sums

    def _input(self, x_btd: jax.Array, norm: Callable | None) -> jax.Array:
        """The input of attention or feed-forward."""
        h_btd = x_btd if norm is None else shard_stream(norm(x_btd))
        return shard(h_btd, "batch", "seq", "embed")

    def _add(
        self, x_btd: jax.Array, h_btd: jax.Array, norm: Callable | None, key: jax.Array | None
    ) -> jax.Array:
        """Adds the output of attention or feed-forward to the residual stream."""
        h_btd = shard_stream(h_btd)
        if self.placement == "post":
            return norm(x_btd + dropout(h_btd, self.dropout, key))
        if norm is not None:
            h_btd = norm(h_btd)
        return x_btd + dropout(h_btd, self.dropout, key)


def shard_stream(x_btd: jax.Array) -> jax.Array:
    """Shards the residual stream (sequence parallelism over `tensor`)."""
    return shard(x_btd, "batch", "stream", "embed")


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout (Srivastava et al. 2014); the identity without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
