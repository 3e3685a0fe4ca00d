"""Initializers of weights, and the choices of them that a config declares."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.errors import check_positive
from lm.parallel.sharding import active_mesh

# Functions that return one are cached: the initializer is part of a module's pytree structure,
# which is then equal for all modules of one declaration.
Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype], jax.Array]


def zeros(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """All zeros."""
    return jnp.zeros(shape, dtype)


@functools.cache
def constant(value: float) -> Initializer:
    """All entries equal to `value`."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


@functools.cache
def normal(std: float) -> Initializer:
    """Gaussian of mean 0."""
    return _drawn(lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype))


@functools.cache
def truncated_normal(std: float) -> Initializer:
    """Gaussian of mean 0, truncated at three standard deviations."""
    return _drawn(
        lambda key, shape, dtype: std * jax.random.truncated_normal(key, -3, 3, shape, dtype)
    )


def _drawn(draw: Initializer) -> Initializer:
    """Draws with `draw`. The values do not depend on the shape that they are drawn in: one device
    draws a flat array, which compiles several times faster; on a mesh each device draws its own
    part of the final shape."""

    def init(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
        mesh = active_mesh()
        if mesh is None or mesh.size == 1:
            return draw(key, (math.prod(shape),), dtype).reshape(shape)
        return draw(key, shape, dtype)

    return init


class Init(NamedTuple):
    """Initializers of matrices, as functions of (fan in, fan out): `reads` for those that read the
    residual stream, `writes` for those that write to it, two in every layer."""

    reads: Callable[[int, int], Initializer]
    writes: Callable[[int, int], Initializer]


@dataclass(frozen=True, kw_only=True)
class Normal:
    """Normal with the same standard deviation for every matrix."""

    std: float = 0.02

    def __post_init__(self) -> None:
        check_positive(**{"model.init.std": self.std})

    def build(self, layers: int) -> Init:
        return _alike(lambda fan_in, fan_out: normal(self.std))


@dataclass(frozen=True, kw_only=True)
class TruncatedNormal:
    """Normal, truncated at three standard deviations."""

    std: float = 0.02

    def __post_init__(self) -> None:
        check_positive(**{"model.init.std": self.std})

    def build(self, layers: int) -> Init:
        return _alike(lambda fan_in, fan_out: truncated_normal(self.std))


@dataclass(frozen=True, kw_only=True)
class ScaledNormal:
    """Normal, with the matrices that write to the residual stream divided by sqrt(2 layers), so
    that the variance of the stream does not grow with depth (GPT-2, Radford et al. 2019)."""

    std: float = 0.02

    def __post_init__(self) -> None:
        check_positive(**{"model.init.std": self.std})

    def build(self, layers: int) -> Init:
        return Init(
            reads=lambda fan_in, fan_out: normal(self.std),
            writes=lambda fan_in, fan_out: normal(self.std / math.sqrt(2 * layers)),
        )


@dataclass(frozen=True, kw_only=True)
class Xavier:
    """Variance 2 / (fan in + fan out), a compromise that keeps the variance of activations and of
    gradients (Glorot and Bengio 2010)."""

    def build(self, layers: int) -> Init:
        return _alike(lambda fan_in, fan_out: normal(math.sqrt(2 / (fan_in + fan_out))))


@dataclass(frozen=True, kw_only=True)
class He:
    """Variance gain / fan in; a gain of 2 compensates for ReLU (He et al., arXiv:1502.01852)."""

    gain: float = 2.0

    def __post_init__(self) -> None:
        check_positive(**{"model.init.gain": self.gain})

    def build(self, layers: int) -> Init:
        return _alike(lambda fan_in, fan_out: normal(math.sqrt(self.gain / fan_in)))


def _alike(draw: Callable[[int, int], Initializer]) -> Init:
    return Init(reads=draw, writes=draw)


# For modules that are built alone, outside a model.
DEFAULT = Normal().build(layers=1)
