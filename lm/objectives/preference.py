"""Preference optimization: DPO and its kin on pairs of completions, KTO on single ones.

A batch is an ordinary `Batch` whose segments 1 and 2, 3 and 4, ... of each row are pairs, with
positive loss weights on the tokens of the completions. Completions are compared by their implicit
reward, beta * log-ratio, where log-ratio = log p(completion) - log p_reference(completion).

Dropout is off in both models: with it, the policy would differ from its reference at the start.
"""

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.batch import Batch
from lm.errors import UserError, check_not_negative, check_positive
from lm.model import Config, Model
from lm.objectives.objective import START, ExampleObjective, Examples, Frozen
from lm.objectives.token_losses import by_pairs, sum_segments, token_logps


class Completion(NamedTuple):
    """Completions of B rows with P pairs each; arrays [B, P], zero where there is no pair.

    logp    sum of the log-probabilities of the completion's tokens
    ratio   the same, minus that of the reference model; equal to logp without a reference
    tokens  number of the completion's tokens
    """

    logp: jax.Array
    ratio: jax.Array
    tokens: jax.Array

    def per_token(self, x: jax.Array) -> jax.Array:
        """x divided by the number of tokens."""
        return x / jnp.maximum(self.tokens, 1)


class Comparison(NamedTuple):
    """Of the two completions of each pair: the loss and both rewards, [B, P]."""

    loss: jax.Array
    chosen: jax.Array
    rejected: jax.Array


@dataclass(frozen=True, kw_only=True)
class Preference(ExampleObjective):
    """Base class of objectives on pairs (chosen, rejected). Subclass it and define `compare`.

    The weight of the loss is the number of pairs. Metrics, means over pairs: `margin`, the reward
    of the chosen completion minus that of the rejected one; `accuracy`, the share of pairs with a
    positive margin; `chosen_reward`, `rejected_reward`.
    """

    paired = True

    @abc.abstractmethod
    def compare(self, chosen: Completion, rejected: Completion) -> Comparison:
        """The loss and the rewards of each pair."""

    def examples(
        self, apply: Model, batch: Batch, key: jax.Array | None, frozen: Frozen
    ) -> Examples:
        completions_bs, statistics = _completions(apply, batch, frozen)
        chosen, rejected = map(Completion._make, zip(*map(by_pairs, completions_bs)))
        return pair_examples(
            self.compare(chosen, rejected), (chosen.tokens > 0) & (rejected.tokens > 0), statistics
        )


def pair_examples(compared: Comparison, is_pair_bp: jax.Array, statistics: Any) -> Examples:
    """The loss and metrics of each pair."""
    _, chosen, rejected = compared
    metrics = {
        "margin": chosen - rejected,
        "accuracy": chosen > rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
    return Examples(
        loss=jnp.where(is_pair_bp, compared.loss, 0),
        weight=is_pair_bp.astype(jnp.float32),
        metrics={
            name: jax.lax.stop_gradient(jnp.where(is_pair_bp, x, 0).astype(jnp.float32))
            for name, x in metrics.items()
        },
        statistics=statistics,
    )


def _completions(apply: Model, batch: Batch, frozen: Frozen) -> tuple[Completion, Any]:
    """The completion of each segment of each row, and the statistics of the forward pass."""
    logp_bt, statistics = _logps(apply, batch)
    ratio_bt = logp_bt
    reference_bt = getattr(batch, _STORED, None)
    if reference_bt is None and "reference" in frozen:
        reference_bt, _ = _logps(frozen["reference"], batch)
    if reference_bt is not None:
        # Of each token: the sums of long completions are large, and their difference is small.
        ratio_bt = logp_bt - jax.lax.stop_gradient(reference_bt)
    counted_bt = batch.weights > 0

    def total(x_bt: jax.Array) -> jax.Array:
        return sum_segments(jnp.where(counted_bt, x_bt, 0), batch.segments)

    tokens_bs = total(jnp.ones_like(logp_bt))
    return Completion(total(logp_bt), total(ratio_bt), tokens_bs), statistics


def _logps(model: Model, batch: Batch) -> tuple[jax.Array, Any]:
    output = model(batch.tokens, segments_bt=batch.segments, positions_bt=batch.positions)
    return token_logps(model, output.hidden_btd, batch.targets), output.statistics


_STORED = "reference_logp"


@dataclass(frozen=True, kw_only=True)
class Referenced(ExampleObjective):
    """Base class of objectives that compare with a frozen reference model.

    beta       strength of the pull to the reference
    reference  a run folder or Hugging Face folder; START: the weights that training starts from
    stored     compute the reference's log-probability of each token once, before the first update,
               and keep it in RUN/stored; the reference takes no memory in training. Worth it for
               several epochs, or a reference that does not fit beside the model
    """

    beta: float = 0.1
    reference: str = START
    stored: bool = False

    def __post_init__(self) -> None:
        check_positive(**{"objective.beta": self.beta})

    def models(self) -> dict[str, str]:
        return {"reference": self.reference}

    def stored_fields(self) -> dict[str, np.dtype]:
        return {_STORED: np.dtype("f4")} if self.stored else {}

    def precompute(self, config: Config, batch: Batch, frozen: Frozen) -> dict[str, jax.Array]:
        return {_STORED: _logps(frozen["reference"], batch)[0]}


@dataclass(frozen=True, kw_only=True)
class DPO(Referenced, Preference):
    """Direct preference optimization (Rafailov et al., arXiv:2305.18290):

        margin = beta * (log-ratio of chosen - log-ratio of rejected)
        loss = -log sigmoid(margin)

    label_smoothing   e, the probability that a label is wrong (cDPO, Mitchell 2023):
                      loss = -(1 - e) log sigmoid(margin) - e log sigmoid(-margin)
    normalize_length  divide each log-ratio by the tokens of its completion (TRL's sigmoid_norm);
                      beta is then ten to a hundred times larger
    sft_weight        adds sft_weight * (mean loss per token of the chosen completion) (RPO, Pang
                      et al., arXiv:2404.19733). TRL averages over the tokens of the whole batch
                      instead, which weighs long completions more and depends on the micro-batches
    beta, reference, stored  see `Referenced`
    """

    label_smoothing: float = 0.0
    normalize_length: bool = False
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(**{"objective.sft_weight": self.sft_weight})
        _check_smoothing(self.label_smoothing)

    def compare(self, chosen: Completion, rejected: Completion) -> Comparison:
        rewards = (
            self.beta * (c.per_token(c.ratio) if self.normalize_length else c.ratio)
            for c in (chosen, rejected)
        )
        compared = _sigmoid_loss(*rewards, self.label_smoothing)
        sft = -chosen.per_token(chosen.logp)
        return compared._replace(loss=compared.loss + self.sft_weight * sft)


@dataclass(frozen=True, kw_only=True)
class IPO(Referenced, Preference):
    """Identity preference optimization (Azar et al., arXiv:2310.12036, equation 17):

        loss = (log-ratio of chosen - log-ratio of rejected - 1 / (2 * beta)) ** 2

    with log-ratios per token, as the authors use them and as TRL does. The rewards are beta times
    these log-ratios. Fields as in `Referenced`.
    """

    def compare(self, chosen: Completion, rejected: Completion) -> Comparison:
        ratios = [c.per_token(c.ratio) for c in (chosen, rejected)]
        loss = (ratios[0] - ratios[1] - 1 / (2 * self.beta)) ** 2
        return Comparison(loss, *(self.beta * ratio for ratio in ratios))


@dataclass(frozen=True, kw_only=True)
class SimPO(Preference):
    """Simple preference optimization (Meng et al., arXiv:2405.14734), without a reference:

        reward = beta * mean log-probability per token
        loss = -log sigmoid(reward of chosen - reward of rejected - gamma)

    The paper uses beta from 2 to 10 and gamma from 0.3 to 0.5 of it. label_smoothing as in DPO.
    """

    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_positive(**{"objective.beta": self.beta})
        check_not_negative(**{"objective.gamma": self.gamma})
        _check_smoothing(self.label_smoothing)

    def compare(self, chosen: Completion, rejected: Completion) -> Comparison:
        rewards = (self.beta * c.per_token(c.logp) for c in (chosen, rejected))
        return _sigmoid_loss(*rewards, self.label_smoothing, self.gamma)


@dataclass(frozen=True, kw_only=True)
class KTO(Referenced):
    """Kahneman-Tversky optimization (Ethayarajh et al., arXiv:2402.01306) on single completions,
    each labelled desirable or undesirable:

        margin = beta * (log-ratio - z0), negated for an undesirable completion
        loss = weight * (1 - sigmoid(margin))

    Segments 1, 3, 5, ... of a row are the completions, with loss weights 1 on the tokens of a
    desirable and 2 on those of an undesirable one. Each is followed by its prompt with the
    completion of another example. z0, without a gradient, is the mean log-ratio of these, at least
    0. It is a mean over all devices, but only over one micro-batch, as in TRL: with gradient
    accumulation the loss depends on the number of micro-batches.

    The weight of the loss is the number of completions. Metrics, means over them: `margin`;
    `accuracy`, the share with a positive margin; `kl`, which is z0.

    desirable_weight, undesirable_weight  factors of the loss, to balance unequal numbers of both
    beta, reference, stored               see `Referenced`
    """

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    paired = True

    def __post_init__(self) -> None:
        super().__post_init__()
        fields = ("desirable_weight", "undesirable_weight")
        check_positive(**{f"objective.{name}": getattr(self, name) for name in fields})

    def examples(
        self, apply: Model, batch: Batch, key: jax.Array | None, frozen: Frozen
    ) -> Examples:
        completions_bs, statistics = _completions(apply, batch, frozen)
        completion, other = map(Completion._make, zip(*map(by_pairs, completions_bs)))
        exists = (completion.tokens > 0) & (other.tokens > 0)
        weight = exists.astype(jnp.float32)
        weights_bp, _ = by_pairs(sum_segments(batch.weights, batch.segments))
        desirable = weights_bp < 1.5 * completion.tokens

        divergence = jnp.sum(weight * other.ratio) / jnp.maximum(jnp.sum(weight), 1)
        z0 = jax.lax.stop_gradient(jnp.maximum(divergence, 0))
        margin = jnp.where(desirable, 1, -1) * self.beta * (completion.ratio - z0)
        factor = jnp.where(desirable, self.desirable_weight, self.undesirable_weight)
        metrics = {"margin": margin, "accuracy": margin > 0, "kl": z0}
        return Examples(
            loss=weight * factor * (1 - jax.nn.sigmoid(margin)),
            weight=weight,
            metrics={name: jax.lax.stop_gradient(weight * x) for name, x in metrics.items()},
            statistics=statistics,
        )


def _sigmoid_loss(
    chosen: jax.Array, rejected: jax.Array, smoothing: float, gamma: float = 0.0
) -> Comparison:
    """-log sigmoid of how much the reward of the chosen one exceeds that of the other plus gamma,
    with smoothed labels."""
    excess = chosen - rejected - gamma
    loss = -(1 - smoothing) * jax.nn.log_sigmoid(excess) - smoothing * jax.nn.log_sigmoid(-excess)
    return Comparison(loss, chosen, rejected)


def _check_smoothing(value: float) -> None:
    check_not_negative(**{"objective.label_smoothing": value})
    if value >= 0.5:
        raise UserError(
            f"objective.label_smoothing={value!r} must be below 0.5: at least half of the labels "
            "must be right."
        )
