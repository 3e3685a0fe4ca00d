"""Inside shard_map, an array's type says over which mesh axes it differs; the arrays of a loop or
of a custom gradient must agree."""

import jax


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The mesh axes over which one of the arrays differs."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def varying_over(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The array, which then counts as different over all of `axes`."""
    missing = axes - varying_axes(array)
    return jax.lax.pcast(array, tuple(missing), to="varying") if missing else array


def varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, all varying over every axis that one of them varies over."""
    union = varying_axes(*arrays)
    return [varying_over(a, union) for a in arrays]


def shape_like(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *arrays: jax.Array):
    """The type of a kernel's output that varies over every axis that one of the arrays does."""
    kind = jax.sharding.ManualAxisType(varying=varying_axes(*arrays))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
