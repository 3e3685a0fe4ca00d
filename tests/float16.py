"""Whether XLA compiles float16 for this processor."""

import functools

import jax
import numpy as np


@functools.cache
def compiles() -> bool:
    """False on x86 processors without F16C (before 2012), or where XLA_FLAGS exclude it."""
    try:
        jax.jit(lambda x: x.astype("float16") * 2)(np.ones(64, np.float32))
    except jax.errors.JaxRuntimeError:
        return False
    return True
