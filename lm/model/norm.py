"""Normalization over the last axis, computed in float32 and returned in the dtype of the input.

`RMSNorm` and `LayerNorm` are modules; `RMSNormConfig` and `LayerNormConfig` declare them.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from lm.errors import check_not_negative, check_positive
from lm.model.initializers import constant, zeros
from lm.model.param import dense, param

# XLA on CPUs adds in another order where there are fewer vectors. With at least as many, a token's
# numbers are the same, bit for bit, alone and among others.
FEWEST = 8


@dataclass(frozen=True, kw_only=True)
class RMSNormConfig:
    """x / sqrt(mean(x^2) + eps) times a scale (Zhang and Sennrich, arXiv:1910.07467).

    The scale is `offset` + w; w is initialized so that the scale is one. `offset=1.0` is Gemma's
    form, with w initialized to zero.
    """

    eps: float = 1e-6
    offset: float = 0.0

    def __post_init__(self) -> None:
        check_positive(**{"model.norm.eps": self.eps})
        check_not_negative(**{"model.norm.offset": self.offset})

    def build(self, width: int, rngs: nnx.Rngs) -> "RMSNorm":
        """The module for inputs of this width."""
        return RMSNorm(width, eps=self.eps, offset=self.offset, rngs=rngs)


class RMSNorm(nnx.Module):
    """[..., width] -> [..., width]. See `RMSNormConfig`."""

    def __init__(self, width: int, *, eps: float = 1e-6, offset: float = 0.0, rngs: nnx.Rngs):
        self.eps, self.offset = eps, offset
        self.scale = param(rngs, (width,), ("norm",), constant(1 - offset))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(_mean(jnp.square(x32)) + self.eps)
        scale = dense(self.scale).astype(jnp.float32)
        if self.offset:
            scale += self.offset
        return (x32 * inverse * scale).astype(x.dtype)


@dataclass(frozen=True, kw_only=True)
class LayerNormConfig:
    """(x - mean) / sqrt(variance + eps), times a scale, plus a bias (Ba et al.,
    arXiv:1607.06450)."""

    eps: float = 1e-5
    bias: bool = True

    def __post_init__(self) -> None:
        check_positive(**{"model.norm.eps": self.eps})

    def build(self, width: int, rngs: nnx.Rngs) -> "LayerNorm":
        """The module for inputs of this width."""
        return LayerNorm(width, eps=self.eps, bias=self.bias, rngs=rngs)


class LayerNorm(nnx.Module):
    """[..., width] -> [..., width]. See `LayerNormConfig`."""

    def __init__(self, width: int, *, eps: float = 1e-5, bias: bool = True, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, (width,), ("norm",), constant(1))
        self.bias = param(rngs, (width,), ("norm",), zeros) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 -= _mean(x32)
        x32 *= jax.lax.rsqrt(_mean(jnp.square(x32)) + self.eps)
        x32 *= dense(self.scale).astype(jnp.float32)
        if self.bias is not None:
            x32 += dense(self.bias).astype(jnp.float32)
        return x32.astype(x.dtype)


NormConfig = RMSNormConfig | LayerNormConfig


def _mean(x: jax.Array) -> jax.Array:
    """Mean over the last axis, which stays with size 1."""
    vectors = math.prod(x.shape[:-1])
    if vectors >= FEWEST:
        return jnp.mean(x, axis=-1, keepdims=True)
    padded = jnp.pad(x.reshape(vectors, -1), ((0, FEWEST - vectors), (0, 0)))
    return jnp.mean(padded, axis=-1, keepdims=True)[:vectors].reshape(*x.shape[:-1], 1)
