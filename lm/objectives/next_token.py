"""Next-token prediction: the objective of pre-training."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

import kernels_pallas
from lm.data.batch import Batch
from lm.errors import check_not_negative, check_positive
from lm.model import Model
from lm.objectives.objective import Frozen, Loss, Objective
from lm.objectives.token_losses import on_mesh


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

    def loss(self, apply: Model, batch: Batch, key: jax.Array | None, frozen: Frozen) -> Loss:
        """See `Objective.loss`. `batch.weights` are the weights of the targets."""
        output = apply(
            batch.tokens,
            segments_bt=batch.segments,
            positions_bt=batch.positions,
            dropout_key=key,
        )
        compute = functools.partial(
            kernels_pallas.cross_entropy,
            softcap=apply.config.logit_softcap,
            z_loss=self.z_loss,
            chunk=self.chunk,
            vocab_chunk=self.vocab_chunk,
        )
        tokens = batch.targets, batch.weights
        total, nll = on_mesh(compute, output.hidden_btd, apply.unembedding(), *tokens, summed=True)
        weight = jnp.sum(batch.weights, dtype=jnp.float32)
        return Loss(total, weight, {"nll": nll}, output.statistics)
