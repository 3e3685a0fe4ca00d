"""Preference objectives equal their formulas, computed in float64 from each document alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_pairs import CONFIG, Document, documents, in_rows, init, log_probabilities, pack

from lm import data, model, objectives
from lm.errors import UserError
from lm.objectives import DPO, IPO, KTO, Completion, SimPO

PAIRS = 8
DOCUMENTS = documents(2 * PAIRS)
OBJECTIVES = {
    "dpo": DPO(),
    "smoothed": DPO(beta=0.3, label_smoothing=0.2),
    "normalized": DPO(beta=3.0, normalize_length=True),
    "rpo": DPO(sft_weight=0.7),
    "ipo": IPO(beta=0.4),
    "simpo": SimPO(beta=2.5, gamma=1.2, label_smoothing=0.1),
}
MEASURED = {
    "dpo": OBJECTIVES["dpo"],
    "simpo": OBJECTIVES["simpo"],
    "kto": KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7),
}


@functools.cache
def weights(seed: int) -> dict:
    return init(seed)


@jax.jit
def losses(params, reference, batch):
    apply, frozen = model.Model(CONFIG, params), {"reference": model.Model(CONFIG, reference)}
    return {
        name: objective.loss(apply, batch, None, frozen if objective.models() else {})
        for name, objective in MEASURED.items()
    }


@jax.jit
def gradient(params, reference, batch):
    def total(params):
        apply, frozen = model.Model(CONFIG, params), {"reference": model.Model(CONFIG, reference)}
        loss = OBJECTIVES["smoothed"].loss(apply, batch, None, frozen)
        return loss.total, loss

    return jax.grad(total, has_aux=True)(params)


def batch(per_row: int = 4, length: int = 40, docs: list[Document] = DOCUMENTS):
    return pack(in_rows(docs, per_row), length)


@functools.cache
def by_hand() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(logp, log-ratio, tokens) of the chosen and of the rejected completions."""
    logps = [log_probabilities(weights(0), document) for document in DOCUMENTS]
    references = [log_probabilities(weights(1), document) for document in DOCUMENTS]
    logp_d, reference_d, tokens_d = (
        np.array(x)
        for x in ([p.sum() for p in logps], [p.sum() for p in references], [len(p) for p in logps])
    )
    return [(logp_d[i::2], (logp_d - reference_d)[i::2], tokens_d[i::2]) for i in (0, 1)]


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def expected(name: str):
    """(loss, chosen reward, rejected reward) of each pair."""
    (logp_c, ratio_c, tokens_c), (logp_r, ratio_r, tokens_r) = by_hand()
    objective = OBJECTIVES[name]
    chosen, rejected = objective.beta * ratio_c, objective.beta * ratio_r
    if name in ("normalized", "ipo"):
        chosen, rejected = chosen / tokens_c, rejected / tokens_r
    if name == "simpo":
        chosen, rejected = 2.5 * logp_c / tokens_c, 2.5 * logp_r / tokens_r
    margin = chosen - rejected
    loss = {
        "dpo": lambda: -log_sigmoid(margin),
        "smoothed": lambda: -0.8 * log_sigmoid(margin) - 0.2 * log_sigmoid(-margin),
        "normalized": lambda: -log_sigmoid(margin),
        "rpo": lambda: -log_sigmoid(margin) - 0.7 * logp_c / tokens_c,
        "ipo": lambda: (ratio_c / tokens_c - ratio_r / tokens_r - 1 / 0.8) ** 2,
        "simpo": lambda: -0.9 * log_sigmoid(margin - 1.2) - 0.1 * log_sigmoid(1.2 - margin),
    }[name]()
    return loss, chosen, rejected


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_rewards_equal_the_formula(name):
    pairs = (Completion(*map(jnp.float32, completions)) for completions in by_hand())
    got = OBJECTIVES[name].compare(*pairs)
    for value, want in zip(got, expected(name), strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_loss_and_metrics_of_a_batch(name):
    loss = losses(weights(0), weights(1), batch())[name]
    want, chosen, rejected = expected(name)
    assert 0.1 < np.mean(chosen > rejected) < 0.9, "both kinds of pairs are there"
    assert loss.weight == PAIRS
    metrics = {
        "margin": chosen - rejected,
        "accuracy": chosen > rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
    assert loss.metrics.keys() == metrics.keys()
    # float32 log-probabilities of about 20 per completion.
    assert loss.total == pytest.approx(want.sum(), rel=1e-5)
    for measure, value in metrics.items():
        assert loss.metrics[measure] == pytest.approx(value.sum(), rel=1e-5, abs=1e-4), measure


def test_dpo_begins_at_ln_2():
    started = losses(weights(0), weights(0), batch())["dpo"]
    assert started.total / PAIRS == pytest.approx(np.log(2), rel=1e-7)
    assert started.metrics["margin"] == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_raises_the_chosen_and_lowers_the_rejected_completion(name):
    def loss(chosen, rejected):
        pair = (Completion(x, x + 9, jnp.float32(5)) for x in (chosen, rejected))
        return OBJECTIVES[name].compare(*pair).loss

    chosen, rejected = jax.grad(loss, (0, 1))(jnp.float32(-9.0), jnp.float32(-9.0))
    assert chosen < 0 < rejected


def test_kto_equals_the_formula():
    """Completions of every other example are undesirable."""
    docs = [d._replace(weight=2 if i % 4 == 0 else 1) for i, d in enumerate(DOCUMENTS)]
    for reference in (1, 0):  # with the policy itself as reference, z0 is 0
        loss = losses(weights(0), weights(reference), batch(docs=docs))["kto"]
        (_, ratio, _), (_, other, _) = by_hand()
        ratio, other = (x if reference else np.zeros_like(x) for x in (ratio, other))
        z0 = max(0, other.mean())
        sign = np.where(np.arange(PAIRS) % 2 == 0, -1, 1)
        margin = sign * 0.3 * (ratio - z0)
        want = np.where(sign > 0, 1.5, 0.7) * (1 - 1 / (1 + np.exp(-margin)))
        assert loss.weight == PAIRS
        assert loss.total == pytest.approx(want.sum(), rel=1e-5)
        assert loss.metrics["margin"] == pytest.approx(margin.sum(), rel=1e-5)
        assert loss.metrics["accuracy"] == np.sum(margin > 0)
        assert loss.metrics["kl"] == pytest.approx(PAIRS * z0, rel=1e-5)


def test_micro_batches_add_up_to_the_batch():
    whole = batch()
    is_even = np.arange(len(whole.tokens))[:, None] % 2 == 0
    # The other rows are padding: of the shape that is compiled already.
    parts = [type(whole)(*(np.where(mask, x, 0) for x in whole)) for mask in (is_even, ~is_even)]
    want = gradient(weights(0), weights(1), whole)
    one, other = (gradient(weights(0), weights(1), part) for part in parts)
    got = jax.tree.map(lambda a, b: a + b, one, other)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want[0]))
    assert scale > 0.1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * scale),
        *[x[0] for x in (got, want)],
    )
    assert got[1].total == pytest.approx(float(want[1].total), rel=1e-6)


def test_padding_and_the_number_of_pairs_per_row_do_not_matter():
    want = losses(weights(0), weights(1), batch())
    for per_row, length in ((2, 20), (6, 64)):
        got = losses(weights(0), weights(1), batch(per_row, length))
        for name, loss in want.items():
            assert got[name].weight == loss.weight
            assert got[name].total == pytest.approx(float(loss.total), rel=1e-5), name


def test_examples_are_the_pairs():
    apply, frozen = model.Model(CONFIG, weights(0)), {"reference": model.Model(CONFIG, weights(1))}
    examples = jax.jit(lambda b: OBJECTIVES["dpo"].examples(apply, b, None, frozen))(batch())
    pair = np.asarray(examples.weight) > 0
    loss, chosen, rejected = expected("dpo")
    np.testing.assert_allclose(np.asarray(examples.loss)[pair], loss, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(examples.metrics["accuracy"])[pair], chosen > rejected)
    assert not np.asarray(examples.loss)[~pair].any()


def test_models():
    assert DPO().models() == {"reference": objectives.START}
    assert IPO(reference="runs/sft").models() == {"reference": "runs/sft"}
    assert SimPO().models() == {}


def test_an_experiment_needs_pairs_and_the_right_head():
    scalar = dataclasses.replace(CONFIG, head="scalar")
    objectives.RewardModel().check(scalar, data.Pairs())
    DPO().check(CONFIG, data.Pairs())
    objectives.NextToken().check(CONFIG, data.BestFit())
    with pytest.raises(UserError, match=r"objective=SimPO needs pairs.*batch\.packing=BestFit"):
        SimPO().check(CONFIG, data.BestFit())
    with pytest.raises(UserError, match=r"objective=KTO needs pairs"):
        KTO().check(CONFIG, data.Concatenate())
    with pytest.raises(UserError, match=r"objective=DPO needs model\.head='vocab'.*'scalar'"):
        DPO().check(scalar, data.Pairs())
    with pytest.raises(UserError, match=r"objective=RewardModel needs model\.head='scalar'"):
        objectives.RewardModel().check(CONFIG, data.Pairs())


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (DPO, {"beta": 0}, r"objective\.beta=0"),
        (DPO, {"label_smoothing": 0.5}, r"objective\.label_smoothing=0\.5 must be below 0\.5"),
        (DPO, {"sft_weight": -1}, r"objective\.sft_weight=-1"),
        (SimPO, {"gamma": -0.1}, r"objective\.gamma=-0\.1"),
        (IPO, {"beta": -1}, r"objective\.beta=-1"),
        (KTO, {"undesirable_weight": 0}, r"objective\.undesirable_weight=0"),
    ],
)
def test_errors_name_the_field(make, fields, message):
    with pytest.raises(UserError, match=message):
        make(**fields)
