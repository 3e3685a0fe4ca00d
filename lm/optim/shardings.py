"""Shardings of the optimizer state: as the parameters that it belongs to."""

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
    """A NamedSharding for each leaf of the optimizer state.

    A leaf at a parameter's path and of its rank is sharded as the parameter; a dimension of another
    size (1, in factored second moments) is not sharded. Counts and all other leaves are replicated.

    Args:
      params: the parameters or their shapes, a nested dict.
      shardings: the parameters' shardings, a nested dict.
    """
    flat_shardings = trees.flatten(shardings)
    by_path = {
        tuple(path.split("/")): (param, flat_shardings[path])
        for path, param in trees.flatten(params).items()
    }

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        keys = tuple(str(k.key) if isinstance(k, jax.tree_util.DictKey) else None for k in path)
        # The parameter's path is a suffix: before it stand the fields of the optax states.
        for start in range(len(keys)):
            param, param_sharding = by_path.get(keys[start:], (None, None))
            if param is not None and len(param.shape) == len(leaf.shape):
                spec = tuple(param_sharding.spec)
                spec += (None,) * (len(leaf.shape) - len(spec))
                same = [
                    axis if n == m else None
                    for axis, n, m in zip(spec, leaf.shape, param.shape, strict=True)
                ]
                return NamedSharding(mesh, PartitionSpec(*same))
        return sharding.replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(transformation.init, params))
