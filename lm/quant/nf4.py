"""4-bit NormalFloat, the storage of frozen weights in QLoRA (Dettmers et al., arXiv:2305.14314)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError, check_size
from lm.parallel.sharding import shard
from lm.quant.quantizer import Quantizer
from lm.trees import Leaf

# The 16 values of the format (QLoRA, appendix E): quantiles of a normal distribution, scaled to
# [-1, 1], with an exact zero.
TABLE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
_LIMITS = (TABLE[1:] + TABLE[:-1]) / 2  # between neighbouring values


@dataclass(frozen=True, kw_only=True)
class NF4(Quantizer):
    """4-bit NormalFloat: 16 values times the largest magnitude of each block.

    Args:
      block: values that share a scale, consecutive along the model width (the axis "embed").
      double: quantizes the scales too, which saves 0.37 bits per weight with blocks of 64: their
        mean is subtracted, and each group of at most 256 of them, consecutive along the last other
        axis, shares a float32 range. Their codes are of 8 bits with a dynamic exponent.
    """

    block: int = 64
    double: bool = True

    def __post_init__(self) -> None:
        check_size(**{"model.quant.block": self.block})
        if self.block % 2:
            raise UserError(f"model.quant.block={self.block} must be even: a byte has two values.")

    def quantize(self, w: jax.Array, axes: Sequence[str]) -> "NF4Array":
        axis = tuple(axes).index("embed") - len(axes)  # counted from the end: layers come first
        if w.shape[axis] % self.block:
            raise UserError(
                f"model.quant.block={self.block} does not divide the model width "
                f"{w.shape[axis]}; choose a divisor of it, such as "
                f"{math.gcd(w.shape[axis], self.block)}."
            )
        blocks = jnp.moveaxis(w.astype(jnp.float32), axis, -1)
        blocks = blocks.reshape(*blocks.shape[:-1], -1, self.block)
        scales = jnp.max(jnp.abs(blocks), axis=-1)
        scaled = blocks / jnp.where(scales > 0, scales, 1)[..., None]
        codes = jnp.searchsorted(_LIMITS, scaled, side="left").astype(jnp.uint8)
        codes = codes.reshape(*codes.shape[:-2], -1)
        codes = jnp.moveaxis(codes[..., 0::2] << 4 | codes[..., 1::2], -1, axis)
        scales = jnp.moveaxis(scales, -1, axis)
        stack = axes[:1] == ("layers",)
        range_, mean = None, None
        if self.double:
            scales, range_, mean = _quantized_scales(scales, _last(axis, w.ndim), int(stack))
        return NF4Array(codes, scales, range_, mean, axis=axis, dtype=jnp.dtype(w.dtype))


def _last(axis: int, ndim: int) -> int:
    """The last axis that is not the blocks' own, counted from the end."""
    return -1 if axis != -1 or ndim == 1 else -2


def _group(size: int) -> int:
    """Scales that share a range along an axis of this size."""
    return math.gcd(size, 256)


@functools.cache
def dynamic_table() -> np.ndarray:
    """256 values in [-1, 1] with seven binary orders of precision in seven decimal ones of size
    (Dettmers et al., arXiv:2110.02861, figure 2)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        limits = np.linspace(0.1, 1, 2**exponent + 1)
        middles = 10.0 ** (exponent - 6) * (limits[1:] + limits[:-1]) / 2
        values += [*middles, *-middles]
    return np.sort(np.array(values, np.float32))


def _quantized_scales(
    scales: jax.Array, along: int, stack: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(uint8 codes, range of each group, mean of each layer) of float32 scales."""
    mean = jnp.mean(scales, axis=tuple(range(stack, scales.ndim)), keepdims=True)
    centred = jnp.moveaxis(scales - mean, along, -1)
    groups = centred.reshape(*centred.shape[:-1], -1, _group(centred.shape[-1]))
    range_ = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    table = dynamic_table()
    limits = (table[1:] + table[:-1]) / 2
    codes = jnp.searchsorted(limits, groups / jnp.where(range_ > 0, range_, 1)).astype(jnp.uint8)
    codes = jnp.moveaxis(codes.reshape(centred.shape), -1, along)
    return codes, jnp.moveaxis(range_[..., 0], -1, along), mean


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4Array(Leaf):
    """A weight in 4-bit NormalFloat.

    codes    uint8, two values per byte along `axis`, the first in the high bits
    scales   of each block: float32, or uint8 codes with double quantization
    range    float32, of each group of scales; None without double quantization
    mean     float32, of the scales of each layer; None likewise
    axis     that of the blocks, counted from the end
    dtype    of the dense weight
    """

    codes: jax.Array
    scales: jax.Array
    range: jax.Array | None
    mean: jax.Array | None
    axis: int = dataclasses.field(default=-1, metadata={"static": True})
    dtype: Any = dataclasses.field(default=jnp.dtype("float32"), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] *= 2
        return tuple(shape)

    def astype(self, dtype: Any) -> "NF4Array":
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def dense(self) -> jax.Array:
        codes = jnp.moveaxis(self.codes, self.axis, -1)
        values = jnp.asarray(TABLE)[jnp.stack([codes >> 4, codes & 15], axis=-1)]
        scales = jnp.moveaxis(self._scales(), self.axis, -1)
        blocks = values.reshape(*scales.shape, -1) * scales[..., None]
        dense = blocks.reshape(*codes.shape[:-1], -1)
        return jnp.moveaxis(dense, -1, self.axis).astype(self.dtype)

    def _scales(self) -> jax.Array:
        """The scale of each block in float32."""
        if self.range is None:
            return self.scales
        along = _last(self.axis, self.codes.ndim)
        size = self.scales.shape[along] // self.range.shape[along]
        ranges = jnp.repeat(self.range, size, axis=along)
        return jnp.asarray(dynamic_table())[self.scales] * ranges + self.mean

    def einsum(
        self, equation: str, x: jax.Array, axes: Sequence[str], product: Callable[..., jax.Array]
    ) -> jax.Array:
        return _product(equation, tuple(axes), x, self)

    def of_arrays(self, function: Callable[..., Any], axes: Sequence[str]) -> Any:
        axes = tuple(axes)
        range_, mean = self.range, self.mean
        if range_ is not None:
            # Small arrays: every device has all of them.
            stack = axes[:1] if axes[0] == "layers" else ()
            whole = stack + ("norm",) * (len(axes) - len(stack))
            range_, mean = function(whole, range_), function(whole, mean)
        return dataclasses.replace(
            self,
            codes=function(axes, self.codes),
            scales=function(axes, self.scales),
            range=range_,
            mean=mean,
        )


# A custom derivative, so that the backward pass keeps the codes and not the dense weight, nor the
# activations, which only the gradient of the weight would need.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, axes: tuple[str, ...], x: jax.Array, leaf: NF4Array) -> jax.Array:
    return jnp.einsum(equation, x, _gathered(leaf, axes))


def _product_forward(equation, axes, x, leaf):
    return _product(equation, axes, x, leaf), leaf


def _product_backward(equation, axes, leaf, dy):
    letters, y = equation.split("->")
    x, w = letters.split(",")
    return jnp.einsum(f"{y},{w}->{x}", dy, _gathered(leaf, axes)), None


_product.defvjp(_product_forward, _product_backward)


def _gathered(leaf: NF4Array, axes: tuple[str, ...]) -> jax.Array:
    """The dense weight. Codes are all-gathered over `fsdp`, not the values."""
    return leaf.of_arrays(lambda names, x: shard(x, *names), axes).dense()
