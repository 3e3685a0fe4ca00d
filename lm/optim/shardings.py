"""Where the optimizer's state lies: beside the parameters it belongs to."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lm import trees
from lm.parallel import sharding


def state_shardings(
    transformation: optax.GradientTransformation,
    params: trees.Tree,
    shardings: trees.Tree,
    mesh: jax.sharding.Mesh,
) -> Any:
    """A NamedSharding for each leaf of the optimizer's state, given the parameters' shapes and
    shardings (nested dicts).

    A state leaf that stands at a parameter's path is split as the parameter is; a dimension reduced
    to size 1, as in factored second moments, is not split. Counts and other leaves are copied to
    every device.
    """
    by_path = {
        tuple(path.split("/")): (leaf, split)
        for (path, leaf), split in zip(
            trees.flatten(params).items(), trees.flatten(shardings).values(), strict=True
        )
    }

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        keys = tuple(str(k.key) if isinstance(k, jax.tree_util.DictKey) else None for k in path)
        for start in range(len(keys)):
            param, split = by_path.get(keys[start:], (None, None))
            if param is not None and len(param.shape) == len(leaf.shape):
                parts = tuple(split.spec) + (None,) * (len(leaf.shape) - len(split.spec))
                kept = [
                    p if n == m else None
                    for p, n, m in zip(parts, leaf.shape, param.shape, strict=True)
                ]
                return NamedSharding(mesh, PartitionSpec(*kept))
        return sharding.replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(transformation.init, params))
