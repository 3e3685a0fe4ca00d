"""Inside shard_map, an array's type says over which mesh axes it differs; the arrays of a loop or
of a custom gradient must agree."""

import jax


def varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, all varying over every axis that one of them varies over."""
    each = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    union = frozenset().union(*each)
    return [
        jax.lax.pcast(a, tuple(union - axes), to="varying") if union - axes else a
        for a, axes in zip(arrays, each, strict=True)
    ]


def shape_like(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *arrays: jax.Array):
    """The type of a kernel's output that varies over every axis that one of the arrays does."""
    each = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    kind = jax.sharding.ManualAxisType(varying=frozenset().union(*each))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
