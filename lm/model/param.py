"""Weights: the one way to declare one, the one way to multiply by one, and how they are drawn."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.errors import check_positive
from lm.parallel.sharding import active_mesh, shard, shard_weight

Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype], jax.Array]


def param(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], init: Initializer
) -> nnx.Param:
    """A float32 weight of this shape, with one logical axis name per dimension (see lm.parallel.sharding);
    its axes and its initialiser stay with it."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} and axes {tuple(axes)} differ in length")
    value = init(rngs.params(), tuple(shape), jnp.float32)
    return nnx.Param(value, axes=tuple(axes), init=init)


def einsum(equation: str, x: jax.Array, w: nnx.Param) -> jax.Array:
    """Activations times a weight. Every matrix product of the dense model goes through here."""
    return _product(equation, x, gathered(w[...], w.get_metadata()["axes"]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(w: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """All of a weight that a device multiplies by, collected over fsdp just before its use; the
    gradient is summed straight into the parts in which the weight is kept.

    Left to itself, XLA turns the product into a ring of narrow ones, which add up in the format of
    the activations and read and write them at every turn.
    """
    return shard(w, *axes)


def _gathered_forward(w: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, None]:
    return gathered(w, axes), None


def _gathered_backward(axes: tuple[str, ...], _: None, dw: jax.Array) -> tuple[jax.Array]:
    return (shard_weight(dw, *axes),)


gathered.defvjp(_gathered_forward, _gathered_backward)


# Written out, because XLA on CPU copies, in slow loops, operands of a product that contracts two
# axes unless they are the last of one and the first of the other, in one order.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return _product_forward(equation, x, w)[0]


def _product_forward(equation: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    x_letters, w_letters, _ = _letters(equation)
    return _contract(x, x_letters, w, w_letters), (x, w)


def _product_backward(equation: str, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    x_letters, w_letters, y_letters = _letters(equation)

    def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jnp.einsum(f"{x_letters},{y_letters}->{w_letters}", x, dy)

    def flat_weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
        tokens = math.prod(x.shape[:2])
        return (x.reshape(tokens, -1).T @ dy.reshape(tokens, -1)).reshape(w.shape)

    dw = jax.lax.platform_dependent(x, dy, cpu=flat_weight_gradient, default=weight_gradient)
    return _contract(dy, y_letters, w, w_letters), dw


_product.defvjp(_product_forward, _product_backward)


def _letters(equation: str) -> tuple[str, str, str]:
    inputs, output = equation.split("->")
    x_letters, w_letters = inputs.split(",")
    return x_letters, w_letters, output


def _contract(x: jax.Array, x_letters: str, w: jax.Array, w_letters: str) -> jax.Array:
    """Sums over the letters that both have; the others stay in their order, those of x first."""
    shared = [letter for letter in x_letters if letter in w_letters]
    axes = tuple([letters.index(letter) for letter in shared] for letters in (x_letters, w_letters))
    return jax.lax.dot_general(x, w, (axes, ((), ())))


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """`x + bias`, or `x` where there is none."""
    return x if bias is None else x + bias[...]


def zeros(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """The initialiser of biases."""
    return jnp.zeros(shape, dtype)


def constant(value: float) -> Initializer:
    """Every entry the same."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def normal(std: float) -> Initializer:
    """Gaussian of mean 0."""
    return _drawn(lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype))


def truncated_normal(std: float) -> Initializer:
    """Gaussian of mean 0, cut off at three `std`."""
    return _drawn(
        lambda key, shape, dtype: std * jax.random.truncated_normal(key, -3, 3, shape, dtype)
    )


def _drawn(draw: Initializer) -> Initializer:
    """The numbers of `draw`, which do not depend on the shape they are asked for in. On one device
    they come in a row, which compiles several times faster; on several in their own shape, of
    which each device draws its part."""

    def init(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
        mesh = active_mesh()
        if mesh is None or mesh.size == 1:
            return draw(key, (math.prod(shape),), dtype).reshape(shape)
        return draw(key, shape, dtype)

    return init


class Init(NamedTuple):
    """How the matrices of a model are drawn, each a function of (fan in, fan out): those that read
    the residual stream, and those that write to it, of which there are two in every layer."""

    reads: Callable[[int, int], Initializer]
    writes: Callable[[int, int], Initializer]


@dataclass(frozen=True, kw_only=True)
class Normal:
    """Every matrix from a normal distribution of one standard deviation."""

    std: float = 0.02

    def __post_init__(self) -> None:
        check_positive(**{"model.init.std": self.std})

    def build(self, layers: int) -> Init:
        return _alike(lambda fan_in, fan_out: normal(self.std))


@dataclass(frozen=True, kw_only=True)
class TruncatedNormal:
    """As Normal, without the tails beyond three standard deviations."""

    std: float = 0.02

    def __post_init__(self) -> None:
        check_positive(**{"model.init.std": self.std})

    def build(self, layers: int) -> Init:
        return _alike(lambda fan_in, fan_out: truncated_normal(self.std))


@dataclass(frozen=True, kw_only=True)
class ScaledNormal:
    """As Normal, with what writes to the residual stream divided by sqrt(2 layers), so that the
    stream's variance does not grow with depth (GPT-2, Radford et al. 2019)."""

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
    """Variance 2 / (fan in + fan out), between what keeps activations and what keeps gradients
    level (Glorot and Bengio 2010)."""

    def build(self, layers: int) -> Init:
        return _alike(lambda fan_in, fan_out: normal(math.sqrt(2 / (fan_in + fan_out))))


@dataclass(frozen=True, kw_only=True)
class He:
    """Variance gain / fan in; a gain of 2 makes up for what ReLU discards (He et al.,
    arXiv:1502.01852)."""

    gain: float = 2.0

    def __post_init__(self) -> None:
        check_positive(**{"model.init.gain": self.gain})

    def build(self, layers: int) -> Init:
        return _alike(lambda fan_in, fan_out: normal(math.sqrt(self.gain / fan_in)))


def _alike(draw: Callable[[int, int], Initializer]) -> Init:
    return Init(reads=draw, writes=draw)
