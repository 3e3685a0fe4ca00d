"""Normalisation over the last axis, computed in float32 and returned in the dtype of its input."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from lm.errors import check_positive
from lm.model.param import constant, param, zeros


@dataclass(frozen=True, kw_only=True)
class RMSNorm:
    """x / sqrt(mean(x^2) + eps) times a scale (Zhang and Sennrich, arXiv:1910.07467).

    The scale is `offset` + w, and w starts where the scale is one; `offset=1.0` is Gemma's form,
    whose w starts at zero.
    """

    eps: float = 1e-6
    offset: float = 0.0

    def __post_init__(self) -> None:
        check_positive(**{"model.norm.eps": self.eps})

    def build(self, width: int, rngs: nnx.Rngs) -> "_RMSNorm":
        return _RMSNorm(self, width, rngs)


class _RMSNorm(nnx.Module):
    def __init__(self, config: RMSNorm, width: int, rngs: nnx.Rngs):
        self.eps, self.offset = config.eps, config.offset
        self.scale = param(rngs, (width,), ("norm",), constant(1 - config.offset))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        if self.offset:
            scale += self.offset
        return (x32 * inverse * scale).astype(x.dtype)


@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """(x - mean) / sqrt(variance + eps), times a scale, plus a bias (Ba et al.,
    arXiv:1607.06450)."""

    eps: float = 1e-5
    bias: bool = True

    def __post_init__(self) -> None:
        check_positive(**{"model.norm.eps": self.eps})

    def build(self, width: int, rngs: nnx.Rngs) -> "_LayerNorm":
        return _LayerNorm(self, width, rngs)


class _LayerNorm(nnx.Module):
    def __init__(self, config: LayerNorm, width: int, rngs: nnx.Rngs):
        self.eps = config.eps
        self.scale = param(rngs, (width,), ("norm",), constant(1))
        self.bias = param(rngs, (width,), ("norm",), zeros) if config.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 -= jnp.mean(x32, -1, keepdims=True)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        x32 *= self.scale[...].astype(jnp.float32)
        if self.bias is not None:
            x32 += self.bias[...].astype(jnp.float32)
        return x32.astype(x.dtype)


Norm = RMSNorm | LayerNorm
