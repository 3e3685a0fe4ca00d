"""Fixtures of the Hugging Face tests."""

import functools
from pathlib import Path

import pytest
from hf_folders import write_folder

import lm


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """folder(family) returns a Hugging Face folder. Tests must not change it."""
    to = tmp_path_factory.mktemp("hf")

    @functools.cache
    def make(family: str) -> Path:
        return write_folder(family, to)

    return make


@pytest.fixture(scope="session")
def opened(folder):
    """opened(family) returns the folder loaded as a Run."""
    return functools.cache(lambda family: lm.load(folder(family)))
