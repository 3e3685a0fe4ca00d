"""Varying mesh axes. Inside shard_map, an array's type lists the mesh axes over which it varies;
the arrays of a loop carry or of a custom gradient must agree in it."""

import jax


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """Mesh axes over which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def varying_over(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The array, cast to vary over all of `axes`."""
    missing = axes - varying_axes(array)
    return jax.lax.pcast(array, tuple(missing), to="varying") if missing else array


def varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, each cast to vary over every axis that any of them varies over."""
    union = varying_axes(*arrays)
    return [varying_over(a, union) for a in arrays]


def shape_like(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *arrays: jax.Array):
    """Type of a kernel output that varies over every axis that any of the arrays varies over."""
    kind = jax.sharding.ManualAxisType(varying=varying_axes(*arrays))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
