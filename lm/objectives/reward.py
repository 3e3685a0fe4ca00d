"""Reward model: a scalar for each completion, trained on pairs."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm.data.batch import Batch
from lm.errors import check_not_negative
from lm.model import Model
from lm.objectives.objective import ExampleObjective, Examples, Frozen
from lm.objectives.preference import Comparison, pair_examples
from lm.objectives.token_losses import by_pairs, sum_segments


@dataclass(frozen=True, kw_only=True)
class RewardModel(ExampleObjective):
    """Bradley-Terry loss of a model with `head="scalar"`, on pairs (chosen, rejected):

        loss = -log sigmoid(r_chosen - r_rejected - margin) + center * (r_chosen + r_rejected) ** 2

    The reward r is the value at the last token of a document. Batch and metrics are those of
    `Preference`; the weight is the number of pairs.

    margin  least difference that is wanted (Llama 2, arXiv:2307.09288)
    center  pulls rewards towards zero mean (Eisenstein et al., arXiv:2312.09244), TRL's
            center_rewards_coefficient; 0.01 is usual
    """

    margin: float = 0.0
    center: float = 0.0

    head = "scalar"
    paired = True

    def __post_init__(self) -> None:
        check_not_negative(**{"objective.margin": self.margin, "objective.center": self.center})

    def examples(
        self, apply: Model, batch: Batch, key: jax.Array | None, frozen: Frozen
    ) -> Examples:
        segments_bt = batch.segments
        output = apply(
            batch.tokens, segments_bt=segments_bt, positions_bt=batch.positions, dropout_key=key
        )
        next_bt = jnp.pad(segments_bt[:, 1:], ((0, 0), (0, 1)))
        last_bt = (segments_bt != next_bt) & (segments_bt > 0)
        values_bt = jnp.where(last_bt, apply.values(output.hidden_btd), 0)
        chosen, rejected = by_pairs(sum_segments(values_bt, segments_bt))
        _, is_pair = by_pairs(sum_segments(last_bt.astype(jnp.int32), segments_bt))
        loss = -jax.nn.log_sigmoid(chosen - rejected - self.margin)
        loss += self.center * (chosen + rejected) ** 2
        compared = Comparison(loss, chosen, rejected)
        return pair_examples(compared, is_pair > 0, output.statistics)
