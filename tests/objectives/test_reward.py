"""The reward model's loss equals the formula; the reward is the value at the last token."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from packed_pairs import documents, in_rows, pack

from lm import objectives
from lm.errors import UserError

DOCUMENTS = documents(12)


class Values:
    """A model whose value of each token is a function of it and of its position."""

    def __call__(self, tokens_bt, **inputs):
        hidden = np.sin(0.1 * tokens_bt) + 0.3 * inputs["positions_bt"]
        return SimpleNamespace(hidden_btd=hidden[..., None], statistics={})

    def values(self, hidden_btd):
        return hidden_btd[..., 0]


def rewards():
    """Of the chosen and of the rejected documents."""
    values = [np.sin(0.1 * d.tokens[-2]) + 0.3 * (len(d.tokens) - 2) for d in DOCUMENTS]
    return np.array(values[::2]), np.array(values[1::2])


@pytest.mark.parametrize(("per_row", "length"), [(2, 20), (4, 40), (6, 64)])
def test_loss_and_metrics_equal_the_formula(per_row, length):
    batch = pack(in_rows(DOCUMENTS, per_row), length)
    objective = objectives.RewardModel(margin=0.4, center=0.1)
    loss = objective.loss(Values(), batch, None, {})
    chosen, rejected = rewards()
    want = np.log1p(np.exp(-(chosen - rejected - 0.4))) + 0.1 * (chosen + rejected) ** 2
    assert loss.weight == 6
    assert loss.total == pytest.approx(want.sum(), rel=1e-6)
    assert loss.metrics["margin"] == pytest.approx(np.sum(chosen - rejected), rel=1e-5)
    assert loss.metrics["accuracy"] == np.sum(chosen > rejected)
    assert loss.metrics["chosen_reward"] == pytest.approx(chosen.sum(), rel=1e-6)
    examples = objective.examples(Values(), batch, None, {})
    is_pair = np.asarray(examples.weight) > 0
    np.testing.assert_allclose(np.asarray(examples.loss)[is_pair], want, rtol=1e-6)


def test_micro_batches_add_up_to_the_batch():
    batch = pack(in_rows(DOCUMENTS, 4), 40)
    loss = objectives.RewardModel(center=0.1).loss
    parts = [
        loss(Values(), type(batch)(*(x[i : i + 1] for x in batch)), None, {}) for i in range(3)
    ]
    summed = jax.tree.map(lambda *x: sum(x), *parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        summed,
        loss(Values(), batch, None, {}),
    )


@pytest.mark.parametrize("field", ["margin", "center"])
def test_errors_name_the_field(field):
    with pytest.raises(UserError, match=rf"objective\.{field}=-1"):
        objectives.RewardModel(**{field: -1})
