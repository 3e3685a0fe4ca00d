"""Nested dicts of arrays: paths, counts, norms.

A path is the keys joined by '/', as in 'blocks/0/ffn/up'.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Tree = Mapping[str, Any]


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
