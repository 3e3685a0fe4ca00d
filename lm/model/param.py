"""Weights: one function to declare one, and one family of functions to multiply by one.

A weight holds an array or a `trees.Leaf` (a quantized array, an adapter). Nothing outside this file
reads the value of a weight.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.model.initializers import Initializer
from lm.parallel.sharding import shard, shard_weight
from lm.trees import Leaf


class OneKey(NamedTuple):
    """In place of `nnx.Rngs` where only shapes matter. Rngs counts its keys in traced arrays, which
    takes a second per hundred weights."""

    key: jax.Array

    def params(self) -> jax.Array:
        """The key."""
        return self.key


def param(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], init: Initializer
) -> nnx.Param:
    """Declares a float32 weight of `shape` with one logical axis name per dimension (see
    lm.parallel.sharding). Its axes and its initializer are kept as metadata."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} and axes {tuple(axes)} differ in length")
    value = init(rngs.params(), tuple(shape), jnp.float32)
    return nnx.Param(value, axes=tuple(axes), init=init)


def axes_of(w: nnx.Param) -> tuple[str, ...]:
    """Logical axis names of a weight, one per dimension, without the axis of stacked layers."""
    return w.get_metadata()["axes"]


def dense(w: nnx.Param) -> jax.Array:
    """The value of a weight as a plain array, whatever kind of leaf it holds."""
    leaf = w.get_value()
    return leaf.dense() if isinstance(leaf, Leaf) else leaf


def einsum(equation: str, x: jax.Array, w: nnx.Param) -> jax.Array:
    """Activations times a weight. Every matmul of the dense model goes through here."""
    return product(equation, x, w.get_value(), axes_of(w))


def product(equation: str, x: jax.Array, leaf: Any, axes: Sequence[str]) -> jax.Array:
    """Activations times an array or `trees.Leaf` with these logical axes."""
    if isinstance(leaf, Leaf):
        return leaf.einsum(equation, x, axes, product)
    return _product(equation, x, gathered(leaf, tuple(axes)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(w: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """All-gathers a weight over `fsdp` just before its use; reduce-scatters the gradient into the
    shards of the weight.

    Without it, XLA turns the matmul into a ring of narrow matmuls, which accumulate in the dtype of
    the activations and read and write them in every iteration.
    """
    return shard(w, *axes)


def _gathered_forward(w: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, None]:
    return gathered(w, axes), None


def _gathered_backward(axes: tuple[str, ...], _: None, dw: jax.Array) -> tuple[jax.Array]:
    return (shard_weight(dw, *axes),)


gathered.defvjp(_gathered_forward, _gathered_backward)


# A custom derivative, because XLA on CPU copies operands in slow loops when a product contracts two
# axes that are not the last axes of one operand and the first of the other, in the same order.
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
    """Contracts the shared letters; keeps the others in order, those of x first."""
    shared = [letter for letter in x_letters if letter in w_letters]
    axes = tuple([letters.index(letter) for letter in shared] for letters in (x_letters, w_letters))
    return jax.lax.dot_general(x, w, (axes, ((), ())))


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """`x + bias`, or `x` without a bias."""
    return x if bias is None else x + dense(bias)
