"""The one way to declare a weight: shape, logical axes and initialiser on one line."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype], jax.Array]


def param(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], init: Initializer
) -> nnx.Param:
    """A float32 weight of this shape, with one logical axis name per dimension (see lm.sharding)."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} and axes {tuple(axes)} differ in length")
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes))
