"""Answers that the student writes inside the training step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_pairs import CONFIG, VOCAB, documents, in_rows, init, pack

from lm import model
from lm.errors import UserError
from lm.objectives import Distill, ForwardKL
from lm.objectives.distill import ON_POLICY
from lm.objectives.on_policy import rewritten

KEY = jax.random.key(3)
DRAWN = VOCAB - 5  # tokens from this one on are not drawn
WINDOW = dataclasses.replace(CONFIG, attention=dataclasses.replace(CONFIG.attention, window=3))


@functools.cache
def data():
    """Three documents a row, with one answer; the first of each row has two."""
    batch = pack(in_rows(documents(12, seed=1), 3), 32)
    first = batch.segments == 1
    batch.weights[first] = np.where(batch.positions[first] % 3 == 1, 0.0, 2.0)
    return batch


def last_answers(batch):
    """True on the targets of the last answer of each document."""
    own = np.zeros(batch.tokens.shape, bool)
    for b, row in enumerate(batch.segments):
        for segment in range(1, row.max() + 1):
            places = np.flatnonzero((row == segment) & (batch.weights[b] > 0))
            splits = np.flatnonzero(np.diff(places) > 1)
            own[b, places[splits[-1] + 1 :] if splits.size else places] = True
    return own


@functools.partial(jax.jit, static_argnums=0)
def rewrite(config, params, batch):
    return rewritten(model.Model(config, params), batch, KEY, DRAWN)


@functools.partial(jax.jit, static_argnums=0)
def draws(config, params, batch):
    """What the same keys draw from the logits of a forward pass over the packed batch."""
    apply = model.Model(config, params)
    output = apply(batch.tokens, segments_bt=batch.segments, positions_bt=batch.positions)
    logits_btv = apply.logits(output.hidden_btd)[..., :DRAWN]
    keys = [jax.random.fold_in(KEY, t) for t in range(batch.tokens.shape[1])]
    return jnp.stack([jax.random.categorical(k, logits_btv[:, t]) for t, k in enumerate(keys)], 1)


@pytest.mark.parametrize("config", [CONFIG, WINDOW], ids=["full", "window"])
def test_samples_are_those_of_the_forward_pass(config):
    """Token by token with a cache, several documents in a row, as in one pass without."""
    params, own = init(0, config), last_answers(data())
    new = rewrite(config, params, data())
    np.testing.assert_array_equal(new.targets[own], draws(config, params, new)[own])
    assert np.mean(new.targets[own] != data().targets[own]) > 0.8
    assert np.all(new.targets[own] < DRAWN)


def test_everything_else_stays():
    params, own = init(0), last_answers(data())
    new = jax.tree.map(np.array, rewrite(CONFIG, params, data()))
    np.testing.assert_array_equal(new.targets[~own], data().targets[~own])
    np.testing.assert_array_equal(new.weights[~own], data().weights[~own])
    np.testing.assert_array_equal(new.segments, data().segments)
    np.testing.assert_array_equal(new.positions, data().positions)
    # A token is the target before it, in the same document.
    inside = (data().segments[:, 1:] == data().segments[:, :-1]) & (data().segments[:, 1:] > 0)
    np.testing.assert_array_equal(new.tokens[:, 1:][inside], new.targets[:, :-1][inside])
    np.testing.assert_array_equal(new.tokens[:, 1:][~inside], data().tokens[:, 1:][~inside])


def test_an_answer_ends_with_the_token_that_ends_it_in_the_data():
    params, own = init(0), last_answers(data())
    before = rewrite(CONFIG, params, data())
    longest = max(
        ((b, np.flatnonzero(own[b] & (data().segments[b] == s))) for b in range(4) for s in (2, 3)),
        key=lambda each: len(each[1]),
    )
    b, places = longest
    assert len(places) >= 4
    batch = data()._replace(targets=data().targets.copy())
    batch.targets[b, places[-1]] = before.targets[b, places[1]]
    new = rewrite(CONFIG, params, batch)
    first = np.flatnonzero(new.targets[b, places] == batch.targets[b, places[-1]])[0]
    assert first <= 1
    np.testing.assert_array_equal(new.weights[b, places[: first + 1]], 1)
    np.testing.assert_array_equal(new.weights[b, places[first + 1 :]], 0)
    others = np.ones(own.shape, bool)
    others[b, places] = False
    np.testing.assert_array_equal(new.weights[others], before.weights[others])


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(objective, params, batch, key):
    frozen = {"teacher": model.Model(CONFIG, init(1))}

    def mean(params):
        loss = objective.loss(model.Model(CONFIG, params), batch, key, frozen)
        return loss.total / loss.weight

    return jax.value_and_grad(mean)(params)


def test_the_loss_is_that_of_the_new_answers_without_a_gradient_through_the_samples():
    params, key = init(0), jax.random.key(7)
    sampled = Distill(teacher="x", divergence=ForwardKL(), on_policy=1.0)
    plain = dataclasses.replace(sampled, on_policy=0.0)
    got = loss_and_gradient(sampled, params, data(), key)
    samples = jax.random.split(jax.random.fold_in(key, ON_POLICY))[1]
    new = jax.jit(lambda: rewritten(model.Model(CONFIG, params), data(), samples, VOCAB))()
    want = loss_and_gradient(plain, params, new, key)
    assert got[0] != pytest.approx(float(loss_and_gradient(plain, params, data(), key)[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_a_share_of_the_batches():
    """A share of a half: some are those of the data, the others are not."""
    params = init(0)
    half = Distill(teacher="x", on_policy=0.5)
    plain = float(
        loss_and_gradient(dataclasses.replace(half, on_policy=0.0), params, data(), KEY)[0]
    )
    losses = [
        float(loss_and_gradient(half, params, data(), jax.random.key(seed))[0])
        for seed in range(12)
    ]
    same = [loss == pytest.approx(plain, rel=1e-6) for loss in losses]
    assert 2 <= sum(same) <= 10
    others = [loss for loss, is_same in zip(losses, same, strict=True) if not is_same]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"on_policy": 1.5}, r"objective\.on_policy=1\.5"),
        ({"on_policy": -1}, r"objective\.on_policy=-1"),
        ({"on_policy": "half"}, r"objective\.on_policy='half'"),
        ({"on_policy": 0.5, "cross_entropy": 0.1}, r"objective\.cross_entropy=0\.1 .*on_policy"),
        (
            {"on_policy": 0.5, "stored": True, "top_k": 4},
            r"objective\.stored=True .*\.on_policy=0\.5",
        ),
    ],
)
def test_errors_name_the_field(fields, message):
    with pytest.raises(UserError, match=message):
        Distill(teacher="x", **fields)
