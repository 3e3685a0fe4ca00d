"""Knowledge distillation: a student learns the distributions of a teacher (Hinton et al.,
arXiv:1503.02531)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.data.batch import Batch
from lm.errors import UserError, check_not_negative, check_positive, check_size
from lm.model import Model
from lm.objectives.divergence import Divergence, ForwardKL, Options, Sums, divergence_sums
from lm.objectives.objective import ExampleObjective, Examples, Frozen, Loss
from lm.objectives.token_losses import head_layout, sum_segments
from lm.parallel import sharding


@dataclass(frozen=True, kw_only=True)
class Distill(ExampleObjective):
    """Divergence of the student from the teacher for each target, weighted by `batch.weights`:

        loss = divergence + cross_entropy * nll of the target

    The weight of the loss is that of the targets. Metrics, means over it: `divergence`, `nll`.

    Both models must have the same tokens. If their vocabularies are padded to different sizes, the
    distributions are those over the smaller one.

    teacher        a run folder or Hugging Face folder
    divergence     ForwardKL(), ReverseKL() or JSD(beta=...)
    temperature    divides the logits of both. The loss is not multiplied by its square, as in TRL
    cross_entropy  factor of the ordinary loss of the student
    top_k          compare the K most probable tokens of the teacher one by one, and all others as
                   one. That is a lower bound of the divergence, as TRL's loss_add_tail
    chunk          positions whose logits are computed at a time; None: as many as take 64 MiB
    """

    teacher: str
    divergence: Divergence = ForwardKL()
    temperature: float = 1.0
    cross_entropy: float = 0.0
    top_k: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.divergence, Divergence):
            raise UserError(
                f"objective.divergence={self.divergence!r} is not a divergence; use "
                "objectives.ForwardKL(), ReverseKL() or JSD(beta=0.5)."
            )
        check_positive(**{"objective.temperature": self.temperature})
        check_not_negative(**{"objective.cross_entropy": self.cross_entropy})
        sizes = {"objective.top_k": self.top_k, "objective.chunk": self.chunk}
        check_size(**{name: size for name, size in sizes.items() if size is not None})

    def models(self) -> dict[str, str]:
        return {"teacher": self.teacher}

    def loss(self, apply: Model, batch: Batch, key: jax.Array | None, frozen: Frozen) -> Loss:
        sums, statistics = self._sums(apply, batch, key, frozen)
        metrics = {
            "divergence": jnp.sum(batch.weights * sums.divergence_bt),
            "nll": jnp.sum(batch.weights * sums.nll_bt),
        }
        weight = jnp.sum(batch.weights, dtype=jnp.float32)
        return Loss(sums.loss, weight, metrics, statistics)

    def examples(
        self, apply: Model, batch: Batch, key: jax.Array | None, frozen: Frozen
    ) -> Examples:
        """Each document of the batch is an example."""
        sums, statistics = self._sums(apply, batch, key, frozen)

        def weighted(x_bt: jax.Array) -> jax.Array:
            return sum_segments(batch.weights * x_bt, batch.segments)

        metrics = {"divergence": weighted(sums.divergence_bt), "nll": weighted(sums.nll_bt)}
        loss_bs = metrics["divergence"] + self.cross_entropy * metrics["nll"]
        return Examples(loss_bs, weighted(1.0), metrics, statistics)

    def _sums(
        self, apply: Model, batch: Batch, key: jax.Array | None, frozen: Frozen
    ) -> tuple[Sums, dict]:
        inputs = {"segments_bt": batch.segments, "positions_bt": batch.positions}
        teacher = frozen["teacher"]
        output = apply(batch.tokens, dropout_key=key, **inputs)
        hidden_bte = jax.lax.stop_gradient(teacher(batch.tokens, **inputs).hidden_btd)
        matrices = apply.unembedding(), jax.lax.stop_gradient(teacher.unembedding())
        vocab = min(matrix.shape[1] for matrix in matrices)
        w_dv, u_ev = (matrix[:, :vocab] for matrix in matrices)
        options = Options(
            divergence=self.divergence,
            temperature=self.temperature,
            cross_entropy=self.cross_entropy,
            top_k=None if self.top_k is None or self.top_k >= vocab else self.top_k,
            softcaps=(apply.config.logit_softcap, teacher.config.logit_softcap),
            chunk=self.chunk,
        )
        pairs = (output.hidden_btd, w_dv), (hidden_bte, u_ev)
        sums = _on_mesh(options, *pairs, batch.targets, batch.weights)
        return sums, output.statistics


def _on_mesh(options: Options, student, teacher, targets_bt, weights_bt) -> Sums:
    """`divergence_sums` on the active mesh. In a shard_map, each device computes its own tokens and
    its part of the vocabulary; each output matrix is gathered once."""
    layouts = [head_layout(*pair) for pair in (student, teacher)]
    if None in layouts:
        return divergence_sums(options, student, teacher, targets_bt, weights_bt)
    tokens, vocab = layouts[0].tokens, layouts[0].vocab
    options = options._replace(
        vocab_axis=vocab[0] if vocab else None,
        width_axes=tuple(layout.width for layout in layouts),
    )

    def local(*arrays: jax.Array) -> Sums:
        sums = divergence_sums(options, *arrays)
        split = layouts[0].split
        return sums._replace(loss=jax.lax.psum(sums.loss, split)) if split else sums

    pairs = [(tokens, layout.matrix) for layout in layouts]
    in_specs, out_specs = (*pairs, tokens, tokens), Sums(PartitionSpec(), tokens, tokens)
    mapped = sharding.shard_map(local, in_specs, out_specs, axes=layouts[0].axes)
    return mapped(student, teacher, targets_bt, weights_bt)
