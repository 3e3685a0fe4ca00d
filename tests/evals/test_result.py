"""The standard error of a ratio matches the bootstrap and repeated sampling."""

import numpy as np
import pytest

from lm.evals import ratio


def population(random: np.random.Generator, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of very different lengths, each with its own loss per token, which is lower for
    longer documents."""
    tokens_c = np.ceil(random.lognormal(4, 1, clusters))
    rate_c = 3 + random.normal(0, 0.5, clusters) - 0.2 * np.log(tokens_c)
    return rate_c * tokens_c, tokens_c


def test_equal_clusters_give_the_standard_error_of_the_mean():
    values = np.random.default_rng(0).normal(5, 2, 50)
    value, error = ratio(values * 10, np.full(50, 10))
    assert value == pytest.approx(values.mean(), rel=1e-12)
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(50), rel=1e-12)


def test_standard_error_matches_the_bootstrap():
    random = np.random.default_rng(1)
    y_c, x_c = population(random, 500)
    picks = random.integers(0, 500, (4000, 500))
    resampled = y_c[picks].sum(axis=1) / x_c[picks].sum(axis=1)
    # 4,000 resamples give the spread to 1 %; the delta method omits terms of order 1 / 500.
    assert ratio(y_c, x_c)[1] == pytest.approx(resampled.std(), rel=0.05)


def test_standard_error_matches_repeated_sampling():
    random = np.random.default_rng(2)
    samples = [ratio(*population(random, 500)) for _ in range(2000)]
    values, errors = np.array(samples).T
    # The spread of 2,000 estimates is known to 1.6 %.
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(), rel=0.06)


def test_one_cluster_gives_no_standard_error():
    assert ratio(np.array([6.0]), np.array([2.0])) == (3.0, None)
