"""Means and standard errors of an objective's loss and metrics over held-out examples."""

from types import SimpleNamespace

import numpy as np
import pytest
from packed_pairs import CONFIG, documents, in_rows, init, log_probabilities, pack

from lm import data, evals, model, objectives
from lm.errors import UserError
from lm.evals.result import ratio

DOCUMENTS = documents(14)
DPO = objectives.DPO(beta=0.3)


class HeldOut:
    """Two batches; the second one ends in padding."""

    name = "pairs:held_out"

    def __iter__(self):
        rows = [*in_rows(DOCUMENTS, 4), [], []]
        for first in (0, 3):
            yield pack(rows[first : first + 3], 40), None


@pytest.fixture(scope="module")
def policy():
    return model.Model(CONFIG, init(0))


@pytest.fixture(scope="module")
def reference():
    return model.Model(CONFIG, init(1))


@pytest.fixture(scope="module")
def margins(policy, reference):
    logps, references = (
        [log_probabilities(each.params, document).sum() for document in DOCUMENTS]
        for each in (policy, reference)
    )
    rewards = 0.3 * (np.array(logps) - np.array(references))
    return rewards[::2] - rewards[1::2]


def test_preferences(policy, reference, margins):
    results = evals.validate(policy, DPO, {"reference": reference}, HeldOut(), step=5)
    by_name = {result.name: result for result in results}
    wanted = {"loss": np.log1p(np.exp(-margins)), "margin": margins, "accuracy": margins > 0}
    for measure, values in wanted.items():
        result = by_name[f"pairs:held_out/{measure}"]
        assert result.step == 5
        assert result.count == 7
        # float32 log-probabilities of about 20 per completion.
        assert result.value == pytest.approx(np.mean(values), rel=1e-5)
        assert result.stderr == pytest.approx(np.std(values, ddof=1) / 7**0.5, rel=1e-5)
    assert len(results) == 5, "the two rewards too"


def test_distillation(policy, reference):
    """Documents are the examples, and their tokens the weight."""
    objective = objectives.Distill(teacher="runs/big")
    results = evals.validate(policy, objective, {"teacher": reference}, HeldOut())
    by_measure = {result.name.rpartition("/")[2]: result for result in results}
    nll = [-log_probabilities(policy.params, document).sum() for document in DOCUMENTS]
    tokens = [len(document.completion) for document in DOCUMENTS]
    want, error = ratio(np.array(nll), np.array(tokens))
    assert by_measure["nll"].value == pytest.approx(want, rel=1e-5)
    assert by_measure["nll"].stderr == pytest.approx(error, rel=1e-5)
    assert by_measure["nll"].count == sum(tokens)
    assert by_measure["loss"].value == by_measure["divergence"].value > 0


def test_evaluator_takes_objective_and_models_of_the_context(policy, reference, margins):
    asked = []

    def evaluation(*arguments):
        asked.append(arguments)
        return HeldOut()

    prepared = SimpleNamespace(held_out=("pairs",), evaluation=evaluation)
    shape = data.BatchShape(sequences=3, length=40)
    context = evals.Context(5, prepared, shape, DPO, {"reference": reference})
    results = evals.Validation(every=10).evaluate(policy, context)
    assert asked == [("pairs", 40, 3)]
    assert results[0].value == pytest.approx(np.mean(np.log1p(np.exp(-margins))), rel=1e-5)
    few = evals.Validation(every=10, batches=1).evaluate(policy, context)
    assert few[0].count == 6


def test_errors(policy):
    class Empty(HeldOut):
        def __iter__(self):
            yield pack([[], [], []], 40), None

    with pytest.raises(UserError, match=r"'pairs:held_out' has no example for SimPO"):
        evals.validate(policy, objectives.SimPO(), {}, Empty())
    with pytest.raises(UserError, match=r"objective=NextToken is no ExampleObjective"):
        evals.Validation().check(objectives.NextToken())
    evals.Validation().check(DPO)
    with pytest.raises(UserError, match=r"evals\.batches=0"):
        evals.Validation(batches=0)
