"""What a step minimises. An objective is a value whose `loss` returns sums, never means: the step
adds them up and divides once."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import kernels_pallas
from lm import model, trees
from lm.data.batch import Batch
from lm.errors import UserError, check_positive
from lm.parallel import sharding


class Loss(NamedTuple):
    """Sums over a batch, in float32.

    total     scalar, what is minimised, times the weight
    weight    scalar, sum of the label weights
    metrics   name -> scalar, each times the weight
    load      path -> [L?, E], the share of tokens that each expert of an MoE block received, times
              the weight
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]
    load: dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """Cross-entropy of the next token plus z_loss * logsumexp**2 (PaLM, arXiv:2204.02311) plus the
    model's own side losses.

    `chunk` positions and `vocab_chunk` words have logits at a time. One of them alone leaves the
    other whole; None for both lets the kernel choose.
    """

    z_loss: float = 0.0
    chunk: int | None = None
    vocab_chunk: int | None = None

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise UserError(f"objective.z_loss={self.z_loss!r} must be zero or above.")
        sizes = {"objective.chunk": self.chunk, "objective.vocab_chunk": self.vocab_chunk}
        check_positive(**{name: size for name, size in sizes.items() if size is not None})

    def loss(
        self,
        config: model.Config,
        params: trees.Tree,
        batch: Batch,
        *,
        dropout_key: jax.Array | None = None,
        **how: Any,
    ) -> Loss:
        """The loss of `batch`, whose weights say how much each target counts; `how` it is computed
        is for `model.forward`."""
        output = model.forward(
            config,
            params,
            batch.tokens,
            segments_bt=batch.segments,
            positions_bt=batch.positions,
            dropout_key=dropout_key,
            **how,
        )
        total, nll = self._cross_entropy(
            output.hidden_btd,
            model.unembedding(config, params),
            batch.targets,
            batch.weights,
            softcap=config.logit_softcap,
        )
        weight = jnp.sum(batch.weights, dtype=jnp.float32)
        # Side losses are means over tokens; times the weight they are sums like the others.
        side: dict[str, Any] = {
            name: weight * value.astype(jnp.float32) for name, value in output.losses.items()
        }
        load = {path: weight * share for path, share in output.load.items()}
        return Loss(total + sum(side.values()), weight, {"nll": nll, **side}, load)

    def _cross_entropy(
        self, x_btd: jax.Array, w_dv: jax.Array, *rest: jax.Array, softcap: float | None
    ) -> tuple[jax.Array, jax.Array]:
        """(loss, nll), summed. Each device adds up its own tokens, collecting the output matrix and
        summing its gradient over devices as little at a time as the kernel says; under automatic
        sharding both would happen for every chunk of positions."""
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
