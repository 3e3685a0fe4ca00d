"""Cross-entropy of each token, or summed over tokens, on any mesh, and sums over the documents of
packed rows. Logits [B, T, V] are never whole."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import kernels_pallas
from lm.model import Model
from lm.parallel import sharding


class HeadLayout(NamedTuple):
    """How the active mesh splits tokens and an output matrix w_dv.

    tokens  PartitionSpec of arrays [B, T]
    split   mesh axes that split tokens
    width   those of them that split the width D of the matrix too
    vocab   mesh axes that split its vocabulary
    """

    tokens: PartitionSpec
    split: tuple[str, ...]
    width: tuple[str, ...]
    vocab: tuple[str, ...]

    @property
    def matrix(self) -> PartitionSpec:
        """Of w_dv, for the specs of shard_map."""
        return PartitionSpec(self.width or None, self.vocab or None)

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes over which each device has work of its own."""
        return self.split + self.vocab


def head_layout(x_btd: jax.Array, w_dv: jax.Array) -> HeadLayout | None:
    """None where every device computes all of it."""
    if not sharding.is_sharded():
        return None
    tokens = sharding.partition(x_btd.shape[:2], "batch", "seq")
    rows, words = sharding.weight_partition(("embed", "vocab"), w_dv.shape)
    split = tuple(name for part in tokens for name in sharding.split_over(part))
    width = tuple(name for name in sharding.split_over(rows) if name in split)
    layout = HeadLayout(tokens, split, width, sharding.split_over(words))
    return layout if layout.axes else None


def on_mesh(
    compute: Callable[..., Any],
    x_btd: jax.Array,
    w_dv: jax.Array,
    *rest_bt: jax.Array,
    summed: bool,
) -> Any:
    """compute(x_btd, w_dv, *rest_bt) on the active mesh: sums over all tokens if `summed`, else
    arrays [B, T].

    In a shard_map, each device computes its own tokens; the output matrix is gathered and its
    gradient reduced once per vocabulary chunk. With automatic sharding both would happen for every
    chunk of positions.
    """
    layout = head_layout(x_btd, w_dv)
    if layout is None:
        return compute(x_btd, w_dv, *rest_bt)

    def local(*arrays: jax.Array) -> Any:
        (vocab_axis,) = layout.vocab or (None,)
        results = compute(*arrays, vocab_axis=vocab_axis, embed_axes=layout.width)
        return jax.lax.psum(results, layout.split) if summed and layout.split else results

    in_specs = (layout.tokens, layout.matrix, *[layout.tokens] * len(rest_bt))
    out_specs = PartitionSpec() if summed else layout.tokens
    mapped = sharding.shard_map(local, in_specs, out_specs, axes=layout.axes)
    return mapped(x_btd, w_dv, *rest_bt)


def token_logps(model: Model, hidden_btd: jax.Array, targets_bt: jax.Array) -> jax.Array:
    """logp_bt in float32, the log-probability of each target; differentiable.

    The backward pass computes the logits a second time. One pass is enough only where the weight of
    each token is known beforehand, as in next-token prediction.
    """
    compute = functools.partial(kernels_pallas.token_losses, softcap=model.config.logit_softcap)
    return -on_mesh(compute, hidden_btd, model.unembedding(), targets_bt, summed=False)


def sum_segments(x_bt: jax.Array, segments_bt: jax.Array) -> jax.Array:
    """x_bs, the sum over each document of each row; S = T, and segment s is in column s - 1."""
    count = x_bt.shape[1] + 1
    sums = functools.partial(jax.ops.segment_sum, num_segments=count)
    return jax.vmap(sums)(x_bt, segments_bt)[:, 1:]


def by_pairs(x_bs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first_bp, second_bp) of each pair of documents: segments 1 and 2, 3 and 4, ..."""
    pairs = x_bs.shape[1] // 2
    x_bpt = jnp.reshape(x_bs[:, : 2 * pairs], (-1, pairs, 2))
    return x_bpt[..., 0], x_bpt[..., 1]
