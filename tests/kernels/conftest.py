"""Compiler settings of the kernel tests."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiles without LLVM's expensive optimizations, which takes a quarter of the time.

    These tests compile many programs and run each once. Optimized programs run in the tests of lm.
    """
    if jax.default_backend() != "cpu":
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # other tests get optimized programs
