"""Nested dicts of arrays: paths, counts, norms.

A path is the keys joined by '/', as in 'blocks/0/ffn/up'.
"""

import abc
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

Tree = Mapping[str, Any]


class Leaf(abc.ABC):
    """A weight that is not a plain array, such as a quantized array or an adapter around a weight.

    Subclasses are registered as JAX pytrees. `shape` and `dtype` are those of the weight that they
    stand for. `lm.model.param` multiplies by them.
    """

    shape: tuple[int, ...]
    dtype: Any

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """The weight as a plain array of `shape` and `dtype`."""

    @abc.abstractmethod
    def astype(self, dtype: Any) -> Self:
        """The same weight for arithmetic in `dtype`."""

    def einsum(
        self, equation: str, x: jax.Array, axes: Sequence[str], product: Callable[..., jax.Array]
    ) -> jax.Array:
        """Activations times this weight, whose logical axes are `axes`. `product` takes the same
        arguments with an array or another Leaf in place of this one. Override it to avoid the dense
        array."""
        return product(equation, x, self.dense(), axes)

    def of_arrays(self, function: Callable[[Sequence[str], Any], Any], axes: Sequence[str]) -> Any:
        """`function(logical axes, array)` of each of its arrays, in the structure of this leaf;
        `axes` are those of the weight. Override it if not all arrays have the axes of the
        weight."""
        return jax.tree.map(lambda array: function(axes, array), self)


def is_leaf(x: Any) -> bool:
    """For `jax.tree.map(..., is_leaf=is_leaf)`: stops at a `Leaf`."""
    return isinstance(x, Leaf)


def flatten(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """{'a': {'b': x}} -> {'a/b': x}, in the order of the dict. Empty dicts leave no trace."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and not (is_leaf and is_leaf(value)):
            flat.update({f"{key}/{path}": leaf for path, leaf in flatten(value, is_leaf).items()})
        else:
            flat[str(key)] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{'a/b': x} -> {'a': {'b': x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def map_with_path(function: Callable[..., Any], tree: Tree, *rest: Tree) -> dict[str, Any]:
    """Applies `function(path, leaf, *leaves_of_rest)` to each leaf; all trees have one structure.

    A leaf is whatever is not a dict, so tuples (of logical axes) are leaves.
    """
    flat, others = flatten(tree), [flatten(other) for other in rest]
    for other in others:
        if other.keys() != flat.keys():
            differing = sorted(other.keys() ^ flat.keys())
            raise ValueError(f"trees of different structure: {', '.join(differing)}")
    return unflatten({p: function(p, x, *(other[p] for other in others)) for p, x in flat.items()})


def matches(path: str, pattern: str) -> bool:
    """Whether a path matches a pattern, where `*` stands for one key and `**` for any number.

    matches('blocks/0/attention/q', 'blocks/*/attention/**') is True.
    """
    keys, wanted = path.split("/"), pattern.split("/")

    def match(i: int, j: int) -> bool:
        if j == len(wanted):
            return i == len(keys)
        if wanted[j] == "**":
            return any(match(k, j + 1) for k in range(i, len(keys) + 1))
        return i < len(keys) and fnmatch.fnmatchcase(keys[i], wanted[j]) and match(i + 1, j + 1)

    return match(0, 0)


def partition(tree: Tree, patterns: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(leaves whose path matches one of the patterns, all others), as nested dicts."""
    flat = flatten(tree)
    chosen = {p: x for p, x in flat.items() if any(matches(p, pattern) for pattern in patterns)}
    rest = {path: x for path, x in flat.items() if path not in chosen}
    return unflatten(chosen), unflatten(rest)


def merge(a: Tree, b: Tree) -> dict[str, Any]:
    """The union of two trees without a common path."""
    if not b:
        return dict(a)
    return unflatten({**flatten(a), **flatten(b)})


def count(tree: Any) -> int:
    """Number of scalars in a tree of arrays (or of shapes)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays (or of shapes), before any sharding."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def global_norm(tree: Any) -> jax.Array:
    """Square root of the sum of squares of all leaves, summed in float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.stack(squares).sum()) if squares else jnp.float32(0)
