"""Each filter keeps the tokens that its definition in NumPy selects; sampled tokens have the
expected frequencies."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.generate.sampling import Sampling, filtered, sample

ROWS, VOCAB = 8, 50
LOGITS = np.random.default_rng(0).normal(0, 3, (ROWS, VOCAB)).astype(np.float32)

run_filtered = jax.jit(filtered)
run_sample = jax.jit(sample)


def softmax(x_bv: np.ndarray) -> np.ndarray:
    e_bv = np.exp(x_bv - x_bv.max(-1, keepdims=True))
    return e_bv / e_bv.sum(-1, keepdims=True)


def kept(sampling: Sampling, logits: np.ndarray = LOGITS) -> np.ndarray:
    return np.asarray(run_filtered(logits, sampling.filters())) > -np.inf


def smallest_set(p_v: np.ndarray, share: float) -> np.ndarray:
    """The smallest set of most probable tokens whose probabilities sum to `share` or more."""
    order = np.argsort(-p_v)
    enough = np.searchsorted(np.cumsum(p_v[order]), share) + 1
    mask = np.zeros(len(p_v), bool)
    mask[order[:enough]] = True
    return mask


@pytest.mark.parametrize("k", [1, 3, 49, 50, 1000])
def test_top_k_keeps_the_k_largest(k):
    order = np.argsort(np.argsort(-LOGITS, axis=-1), axis=-1)
    np.testing.assert_array_equal(kept(Sampling(top_k=k)), order < k)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.99, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, temperature):
    probabilities = softmax(LOGITS.astype(np.float64) / temperature)
    expected = [smallest_set(row, p) for row in probabilities]
    got = kept(Sampling(top_p=p, temperature=temperature))
    np.testing.assert_array_equal(got, expected if p < 1 else np.ones_like(got))


@pytest.mark.parametrize("p", [0.01, 0.5, 1.0])
def test_min_p_keeps_tokens_above_a_fraction_of_the_largest(p):
    probabilities = softmax(LOGITS)
    expected = probabilities >= p * probabilities.max(-1, keepdims=True)
    np.testing.assert_array_equal(kept(Sampling(min_p=p)), expected)


def test_top_p_applies_to_the_tokens_left_by_top_k():
    order = np.argsort(np.argsort(-LOGITS, axis=-1), axis=-1)
    first_five = np.where(order < 5, softmax(LOGITS), 0)
    first_five /= first_five.sum(-1, keepdims=True)
    expected = [smallest_set(row, 0.8) for row in first_five]
    np.testing.assert_array_equal(kept(Sampling(top_k=5, top_p=0.8)), expected)


def test_ties_are_kept_together():
    logits = np.array([[2.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    np.testing.assert_array_equal(kept(Sampling(top_k=2), logits), [[1, 1, 1, 1, 0]])


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    seen = np.random.default_rng(1).random((ROWS, VOCAB)) < 0.5
    sampling = Sampling(repetition_penalty=1.5, temperature=0.5)
    penalised = np.where(LOGITS > 0, LOGITS / 1.5, LOGITS * 1.5)
    expected = np.where(seen, penalised, LOGITS) / 0.5
    got = run_filtered(LOGITS, sampling.filters(), seen)
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # one rounding of float32 per operation


def test_temperature_zero_takes_the_most_probable_token_with_any_filters():
    keys = jax.random.split(jax.random.key(0), ROWS)
    for sampling in (Sampling(temperature=0), Sampling(temperature=0, top_k=7, top_p=0.5)):
        got = run_sample(LOGITS, sampling.filters(), keys)
        np.testing.assert_array_equal(got, LOGITS.argmax(-1))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=4, min_p=0.05)])
def test_sampled_tokens_have_the_expected_frequencies(sampling):
    draws = 20_000
    logits = np.broadcast_to(LOGITS[:1], (draws, VOCAB))
    keys = jax.random.split(jax.random.key(1), draws)
    tokens = np.asarray(run_sample(logits, sampling.filters(), keys))
    counts = np.bincount(tokens, minlength=VOCAB)
    p = softmax(np.asarray(run_filtered(LOGITS[:1], sampling.filters()), np.float64))[0]
    # Each count is binomial. The probability that any of the 50 counts is off by more than five
    # standard deviations plus one count (for tiny deviations) is below 1e-4.
    bound = 5 * np.sqrt(draws * p * (1 - p)) + 1
    assert (np.abs(counts - draws * p) <= bound).all()
    assert counts[p == 0].sum() == 0


def test_row_depends_only_on_its_own_key_and_logits():
    keys = jax.random.split(jax.random.key(2), ROWS)
    filters = Sampling(top_p=0.9).filters()
    together = run_sample(LOGITS, filters, keys)
    alone = [run_sample(LOGITS[i : i + 1], filters, keys[i : i + 1])[0] for i in range(ROWS)]
    np.testing.assert_array_equal(together, alone)


def test_only_the_choice_of_filters_triggers_recompilation():
    traces = 0

    @jax.jit
    def run(logits, filters):
        nonlocal traces
        traces += 1
        return filtered(logits, filters)

    for k in (1, 2, 3):
        run(LOGITS, Sampling(top_k=k, temperature=0.5 * k).filters())
    run(LOGITS, Sampling(min_p=0.1).filters())
    assert traces == 2


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-46),
        ("repetition_penalty", float("inf")),
        ("temperature", 1e300),
        ("top_k", float("inf")),
        ("top_k", float("nan")),
        ("min_p", float("nan")),
    ],
)
def test_errors_for_invalid_values_name_the_field(field, value):
    with pytest.raises(UserError, match=re.escape(f"sampling.{field}={value!r}")):
        Sampling(**{field: value})


def tiny_or(values):
    return st.one_of(st.none(), values, st.sampled_from([1e-300, 1e-46, 1e-38, 1e-20, 1e-6]))


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.one_of(st.floats(0, 1e6), st.sampled_from([1e-300, 1e-46, 1e-38, 1e-20])),
    top_k=st.one_of(st.none(), st.integers(1, 10**12)),
    top_p=tiny_or(st.floats(1e-6, 1)),
    min_p=tiny_or(st.floats(1e-6, 1)),
    penalty=st.floats(1e-6, 1e6),
)
def test_accepted_options_leave_a_finite_largest_logit(temperature, top_k, top_p, min_p, penalty):
    """float32 arithmetic neither overflows nor removes every token."""
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    logits = jnp.array([[-80.0, 0.0, 3.0, 3.0, 90.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    left = filtered(logits, sampling.filters(), jnp.array([[True, False, True, False, True]] * 2))
    assert jnp.isfinite(left.max(axis=-1)).all() and not jnp.isnan(left).any()
