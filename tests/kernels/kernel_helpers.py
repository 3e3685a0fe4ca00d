"""Helpers of the kernel tests: random arrays, quick compilation, TPU kernels in interpret mode."""

import contextlib
import functools
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


# These tests compile many programs and run each once; without these optimizations compilation takes
# an eighth of the time. Optimized programs run in the tests of lm.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@functools.cache
def compiler_options() -> dict[str, Any]:
    """The options in QUICK that this version of XLA supports."""

    def is_supported(option):
        try:
            jax.jit(lambda: 0, compiler_options=dict([option])).lower().compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return dict(filter(is_supported, QUICK.items()))


def jit(function: Any, **options: Any) -> Any:
    """jax.jit with quick compilation, for functions that are called outside of other transforms."""
    return jax.jit(function, compiler_options=compiler_options(), **options)


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
