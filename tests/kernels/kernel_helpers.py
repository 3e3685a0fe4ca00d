"""Helpers of the kernel tests: random arrays, and TPU kernels in interpret mode."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Normal random numbers. By numpy, since jax.random compiles a program for each shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype))


def uniform(seed: int, *shape: int) -> jax.Array:
    """Uniform random numbers in [0, 1), float32."""
    return jnp.asarray(np.random.default_rng(seed).random(shape, np.float32))


def integers(seed: int, low: int, high: int, *shape: int, dtype: Any = jnp.int32) -> jax.Array:
    """Random integers in low..high-1, converted to `dtype`."""
    return jnp.asarray(np.random.default_rng(seed).integers(low, high, shape).astype(dtype))


def float32(*arrays: Any) -> list[np.ndarray]:
    """The arrays as float32 numpy arrays."""
    return [np.asarray(x).astype(np.float32) for x in arrays]


@contextlib.contextmanager
def interpreted(**options: Any):
    """Runs TPU kernels in interpret mode on CPU. Uninitialized memory is NaN and reads out of
    bounds raise; `options` of InterpretParams override this."""
    checks = {"uninitialized_memory": "nan", "out_of_bounds_reads": "raise"} | options
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**checks)):
            yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()
