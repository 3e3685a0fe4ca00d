"""`TransformerBlock`: attention and feed-forward, each added to the residual stream."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lm.model.adapters import Bottleneck, Prefix
from lm.model.attention import Positions
from lm.model.config import Block, Config
from lm.model.dropout import dropout, layer_key
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
        adapter = config.adapter
        if isinstance(adapter, Prefix):
            prefix = block.attention.build_prefix(adapter.tokens, adapter.std, rngs)
            self.attention.kv_prefix = prefix
        after = adapter.after if isinstance(adapter, Bottleneck) else ()
        self.attention_bottleneck, self.ffn_bottleneck = (
            adapter.build(config.dim, rngs) if part in after else None
            for part in ("attention", "ffn")
        )

    def __call__(
        self,
        x_btd: jax.Array,
        positions: Positions = Positions(),  # noqa: B008
        cache: Any = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        with layer_key(dropout_key):
            h_btd = self._input(x_btd, self.attention_norm)
            h_btd, cache = self.attention(h_btd, positions, cache)
            h_btd = _adapted(h_btd, self.attention_bottleneck)
            x_btd = self._add(x_btd, h_btd, self.attention_out_norm, keys[0])
            h_btd = self._input(x_btd, self.ffn_norm)
            output = self.ffn(h_btd, positions.mask_bt)
            h_btd, sums = output if isinstance(output, tuple) else (output, None)
            h_btd = _adapted(h_btd, self.ffn_bottleneck)
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


def _adapted(h_btd: jax.Array, bottleneck: Callable | None) -> jax.Array:
    return h_btd if bottleneck is None else bottleneck(h_btd)
