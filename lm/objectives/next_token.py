"""Next-token prediction: the objective of pre-training."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import kernels_pallas
from lm.data.batch import Batch
from lm.errors import check_not_negative, check_positive
from lm.model import Model
from lm.objectives.objective import Loss, Objective
from lm.parallel import sharding


@dataclass(frozen=True, kw_only=True)
class NextToken(Objective):
    """Cross-entropy of the next token, plus z_loss * logsumexp**2 (PaLM, arXiv:2204.02311), plus
    the auxiliary losses of the model, which the training step adds.

    Logits are computed for `chunk` positions and `vocab_chunk` vocabulary entries at a time. If
    only one of them is set, the other dimension is whole; if neither, the kernel chooses.
    """

    z_loss: float = 0.0
    chunk: int | None = None
    vocab_chunk: int | None = None

    def __post_init__(self) -> None:
        check_not_negative(**{"objective.z_loss": self.z_loss})
        sizes = {"objective.chunk": self.chunk, "objective.vocab_chunk": self.vocab_chunk}
        check_positive(**{name: size for name, size in sizes.items() if size is not None})

    def loss(self, apply: Model, batch: Batch, key: jax.Array | None, frozen: Any) -> Loss:
        """See `Objective.loss`. `batch.weights` are the weights of the targets."""
        output = apply(
            batch.tokens,
            segments_bt=batch.segments,
            positions_bt=batch.positions,
            dropout_key=key,
        )
        total, nll = self._cross_entropy(
            output.hidden_btd,
            apply.unembedding(),
            batch.targets,
            batch.weights,
            softcap=apply.config.logit_softcap,
        )
        weight = jnp.sum(batch.weights, dtype=jnp.float32)
        return Loss(total, weight, {"nll": nll}, output.statistics)

    def _cross_entropy(
        self, x_btd: jax.Array, w_dv: jax.Array, *rest: jax.Array, softcap: float | None
    ) -> tuple[jax.Array, jax.Array]:
        """(loss, nll), summed over tokens. In a shard_map, each device sums over its own tokens;
        the output matrix is gathered and its gradient reduced once per vocabulary chunk. With
        automatic sharding both would happen for every chunk of positions."""
        compute = functools.partial(
            kernels_pallas.cross_entropy,
            softcap=softcap,
            z_loss=self.z_loss,
            chunk=self.chunk,
            vocab_chunk=self.vocab_chunk,
        )
        if not sharding.is_sharded():
            return compute(x_btd, w_dv, *rest)
        tokens = sharding.partition(x_btd.shape[:2], "batch", "seq")
        rows, words = sharding.weight_partition(("embed", "vocab"), w_dv.shape)
        split = tuple(name for part in tokens for name in sharding.split_over(part))
        kept = tuple(name for name in sharding.split_over(rows) if name in split)
        divided = sharding.split_over(words)
        if not (split or divided):
            return compute(x_btd, w_dv, *rest)

        def local(*arrays: jax.Array) -> Any:
            (vocab_axis,) = divided or (None,)
            sums = compute(*arrays, vocab_axis=vocab_axis, embed_axes=kept)
            return jax.lax.psum(sums, split) if split else sums

        in_specs = (tokens, PartitionSpec(kept or None, divided or None), tokens, tokens)
        mapped = sharding.shard_map(local, in_specs, PartitionSpec(), axes=split + divided)
        return mapped(x_btd, w_dv, *rest)
