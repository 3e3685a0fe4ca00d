"""Knowledge distillation: a student learns the distributions of a teacher (Hinton et al.,
arXiv:1503.02531)."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lm.data.batch import Batch
from lm.errors import UserError, check_not_negative, check_positive, check_size
from lm.model import Config, Model
from lm.objectives.divergence import (
    Divergence,
    ForwardKL,
    Hidden,
    Options,
    Sums,
    TopK,
    divergence_sums,
    top_k,
)
from lm.objectives.objective import ExampleObjective, Examples, Frozen, Loss
from lm.objectives.on_policy import rewritten
from lm.objectives.token_losses import head_layout, on_mesh, sum_segments
from lm.parallel import sharding

ON_POLICY = 1 << 30  # folded into the key of the samples; dropout folds the numbers of layers
_STORED = TopK("teacher_logp", "teacher_ids", "teacher_rest")  # names of the stored fields


@dataclass(frozen=True, kw_only=True)
class Distill(ExampleObjective):
    """Divergence of the student from the teacher for each target, weighted by `batch.weights`:

        loss = divergence + cross_entropy * nll of the target

    The weight of the loss is that of the targets. Metrics, means over it: `divergence`, and
    `nll` without `on_policy`.

    Both models must have the same tokens. If their vocabularies are padded to different sizes, the
    distributions are those over the smaller one.

    teacher        a run folder or Hugging Face folder
    divergence     ForwardKL(), ReverseKL() or JSD(beta=...)
    temperature    divides the logits of both. The loss is not multiplied by its square, as in TRL
    cross_entropy  factor of the ordinary loss of the student
    top_k          compare the K most probable tokens of the teacher one by one, and all others as
                   one. That is a lower bound of the divergence, as TRL's loss_add_tail
    stored         compute the teacher's K most probable tokens once, before the first update, and
                   keep them in RUN/stored, 8 K + 4 bytes for each token; the teacher takes neither
                   memory nor time in training. Needs top_k
    on_policy      share of the batches, chosen at random, whose answers the student writes itself
                   (arXiv:2306.13649; see on_policy.py), one decoding step for each position
    chunk          positions whose logits are computed at a time; None: as many as take 64 MiB
    """

    teacher: str
    divergence: Divergence = ForwardKL()
    temperature: float = 1.0
    cross_entropy: float = 0.0
    top_k: int | None = None
    stored: bool = False
    on_policy: float = 0.0
    chunk: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.divergence, Divergence):
            raise UserError(
                f"objective.divergence={self.divergence!r} is not a divergence; use "
                "objectives.ForwardKL(), ReverseKL() or JSD(beta=0.5)."
            )
        check_positive(**{"objective.temperature": self.temperature})
        check_not_negative(
            **{
                "objective.cross_entropy": self.cross_entropy,
                "objective.on_policy": self.on_policy,
            }
        )
        if self.on_policy > 1:
            raise UserError(f"objective.on_policy={self.on_policy!r} must be at most 1.")
        if self.stored and self.on_policy:
            raise UserError(
                "objective.stored=True holds the teacher's numbers for the answers in the data, "
                f"and objective.on_policy={self.on_policy} replaces them; set one of the two."
            )
        if self.cross_entropy and self.on_policy:
            raise UserError(
                f"objective.cross_entropy={self.cross_entropy} needs the answers in the data, and "
                f"objective.on_policy={self.on_policy} replaces them; set one of the two."
            )
        sizes = {"objective.top_k": self.top_k, "objective.chunk": self.chunk}
        check_size(**{name: size for name, size in sizes.items() if size is not None})
        if self.stored and self.top_k is None:
            raise UserError(
                "objective.stored=True stores the teacher's K most probable tokens, and "
                "objective.top_k=None names no K; set objective.top_k=64."
            )

    def models(self) -> dict[str, str]:
        return {"teacher": self.teacher}

    def stored_fields(self) -> dict[str, np.dtype]:
        if not self.stored:
            return {}
        formats = ("f4", self.top_k), ("i4", self.top_k), "f4"
        return {name: np.dtype(each) for name, each in zip(_STORED, formats)}

    def precompute(self, config: Config, batch: Batch, frozen: Frozen) -> dict[str, jax.Array]:
        teacher, vocab = frozen["teacher"], config.vocab
        if self.top_k >= vocab or teacher.config.vocab < vocab:
            raise UserError(
                f"objective.stored=True needs objective.top_k={self.top_k} below model.vocab="
                f"{vocab}, and a teacher with as many tokens or more, and it has "
                f"{teacher.config.vocab}; set objective.stored=False."
            )
        hidden_bte, u_ev = _hidden(teacher, batch)
        compute = partial(top_k, self._options(vocab, None, teacher.config.logit_softcap))
        stored = on_mesh(compute, hidden_bte, u_ev[:, :vocab], summed=False)
        return dict(zip(_STORED, stored))

    def loss(self, apply: Model, batch: Batch, key: jax.Array | None, frozen: Frozen) -> Loss:
        if self.on_policy and key is not None:
            batch = self._some_rewritten(apply, batch, key, frozen)
        sums, statistics = self._sums(apply, batch, key, frozen)
        metrics = {"divergence": jnp.sum(batch.weights * sums.divergence_bt)}
        if not self.on_policy:  # the likelihood of its own samples says nothing about the data
            metrics["nll"] = jnp.sum(batch.weights * sums.nll_bt)
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

    def _some_rewritten(self, apply: Model, batch: Batch, key: jax.Array, frozen: Frozen) -> Batch:
        choice, samples = jax.random.split(jax.random.fold_in(key, ON_POLICY))
        vocab = min(apply.config.vocab, frozen["teacher"].config.vocab)
        return jax.lax.cond(
            jax.random.uniform(choice) < self.on_policy,
            lambda: rewritten(apply, batch, samples, vocab),
            lambda: batch,
        )

    def _sums(
        self, apply: Model, batch: Batch, key: jax.Array | None, frozen: Frozen
    ) -> tuple[Sums, dict]:
        inputs = {"segments_bt": batch.segments, "positions_bt": batch.positions}
        output = apply(batch.tokens, dropout_key=key, **inputs)
        w_dv, vocab, softcap = apply.unembedding(), apply.config.vocab, None
        if hasattr(batch, _STORED.ids_btk):
            teacher = TopK(*(getattr(batch, name) for name in _STORED))
        else:
            model = frozen["teacher"]
            vocab, softcap = min(vocab, model.config.vocab), model.config.logit_softcap
            hidden_bte, u_ev = jax.lax.stop_gradient(_hidden(model, batch))
            teacher = hidden_bte, u_ev[:, :vocab]
        options = self._options(vocab, apply.config.logit_softcap, softcap)
        student = output.hidden_btd, w_dv[:, :vocab]
        sums = _on_mesh(options, student, teacher, batch.targets, batch.weights)
        return sums, output.statistics

    def _options(self, vocab: int, *softcaps: float | None) -> Options:
        """For a student and a teacher with these softcaps."""
        return Options(
            divergence=self.divergence,
            temperature=self.temperature,
            cross_entropy=self.cross_entropy,
            top_k=None if self.top_k is None or self.top_k >= vocab else self.top_k,
            softcaps=softcaps,
            chunk=self.chunk,
        )


def _hidden(teacher: Model, batch: Batch) -> Hidden:
    output = teacher(batch.tokens, segments_bt=batch.segments, positions_bt=batch.positions)
    return output.hidden_btd, teacher.unembedding()


def _on_mesh(options: Options, student: Hidden, teacher: Hidden | TopK, *tokens_bt) -> Sums:
    """`divergence_sums` on the active mesh. In a shard_map, each device computes its own tokens and
    its part of the vocabulary; each output matrix is gathered once."""
    is_stored = isinstance(teacher, TopK)
    layouts = [head_layout(*pair) for pair in (student, *(() if is_stored else (teacher,)))]
    if None in layouts:
        return divergence_sums(options, student, teacher, *tokens_bt)
    tokens, vocab = layouts[0].tokens, layouts[0].vocab
    options = options._replace(
        vocab_axis=vocab[0] if vocab else None,
        width_axes=tuple(layout.width for layout in layouts),
    )

    def local(*arrays: jax.Array) -> Sums:
        sums = divergence_sums(options, *arrays)
        split = layouts[0].split
        return sums._replace(loss=jax.lax.psum(sums.loss, split)) if split else sums

    pairs = [(tokens, layout.matrix) for layout in layouts] + [tokens] * is_stored
    in_specs, out_specs = (*pairs, tokens, tokens), Sums(PartitionSpec(), tokens, tokens)
    mapped = sharding.shard_map(local, in_specs, out_specs, axes=layouts[0].axes)
    return mapped(student, teacher, *tokens_bt)
