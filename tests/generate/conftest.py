"""Fixtures shared by the generation tests."""

import numpy as np
import pytest
from small_models import VOCAB, config, parameters

from lm import model


@pytest.fixture(scope="session")
def small():
    """The smallest model."""
    return model.Model(config(), parameters(config()))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts of different lengths; all tests use the same ones so that compiled programs are
    shared."""
    random = np.random.default_rng(3)
    return [random.integers(0, VOCAB, n).tolist() for n in (1, 13, 5)]
