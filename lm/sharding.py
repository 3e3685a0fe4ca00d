"""Which device holds which part of an array: two tables from logical axis names to mesh axes, one
for weights, one for activations.

A weight's axes stand beside its shape where it is declared; an activation is constrained with
`shard(x, "batch", "seq", "embed")` at a handful of seams. An unknown name, a mesh axis used twice
in one array, or a size that does not divide raises.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lm import trees
from lm.errors import Refused, check_name, nearest
from lm.mesh import AXES, Mesh

MeshAxes = tuple[str, ...]
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

# fsdp splits weights along the model width; tensor splits heads, feed-forward width and vocabulary
# (Megatron, arXiv:1909.08053).
WEIGHTS: Mapping[str, MeshAxes] = {
    "layers": ("pipe",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "router": (),  # a router's output width: small, and read whole by every device
    "norm": (),  # vectors: too small to be worth gathering
}
ACTIVATIONS: Mapping[str, MeshAxes] = {
    "batch": ("data", "fsdp", "expert"),
    "seq": ("context",),
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "router": (),
    "norm": (),
    "group": ("data", "fsdp"),  # the batch, where the expert axis holds experts
    "capacity": (),
}
# With fewer key/value heads than tensor devices, each device keeps a copy of all of them.
MAY_REPLICATE = ("kv_heads",)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Logical axis -> mesh axes, for weights and for activations."""

    weights: Mapping[str, MeshAxes] = field(default_factory=lambda: WEIGHTS)
    activations: Mapping[str, MeshAxes] = field(default_factory=lambda: ACTIVATIONS)

    def __post_init__(self) -> None:
        for table in (self.weights, self.activations):
            for axis, mesh_axes in table.items():
                for mesh_axis in mesh_axes:
                    check_name(f"rules[{axis!r}]", mesh_axis, AXES)

    def weight(
        self, axes: Sequence[str], shape: Sequence[int], mesh: AnyMesh, path: str = "weight"
    ) -> PartitionSpec:
        """The partition of a weight with these logical `axes` and this `shape`."""
        return _spec(self.weights, axes, shape, mesh, path)

    def activation(self, axes: Sequence[str], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
        """The partition of an activation with these logical `axes` and this `shape`."""
        return _spec(self.activations, axes, shape, mesh, "activation")


def _spec(
    table: Mapping[str, MeshAxes],
    axes: Sequence[str],
    shape: Sequence[int],
    mesh: AnyMesh,
    what: str,
) -> PartitionSpec:
    if len(axes) != len(shape):
        raise Refused(
            f"{what} has shape {tuple(shape)} but axes {tuple(axes)}: "
            "one name per dimension is needed."
        )
    parts: list[MeshAxes | None] = []
    used: dict[str, str] = {}
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = _mesh_axes(table, axis, size, mesh, what)
        for name in mesh_axes:
            if name in used:
                raise Refused(
                    f"{what}: axes {used[name]!r} and {axis!r} both lie on mesh axis {name!r}."
                )
            used[name] = axis
        parts.append(mesh_axes or None)
    return PartitionSpec(*parts)


def _mesh_axes(
    table: Mapping[str, MeshAxes], axis: str, size: int, mesh: AnyMesh, what: str
) -> MeshAxes:
    """The mesh axes of more than one device over which this logical axis is split."""
    if axis not in table:
        raise Refused(f"{what} has the unknown logical axis {axis!r}.{nearest(axis, table)}")
    mesh_axes = tuple(name for name in table[axis] if mesh.shape[name] > 1)
    ways = math.prod(mesh.shape[name] for name in mesh_axes)
    if size % ways == 0:
        return mesh_axes
    if axis in MAY_REPLICATE and ways % size == 0:
        return ()
    on = " and ".join(f"{name}={mesh.shape[name]}" for name in mesh_axes)
    raise Refused(
        f"{what}: {axis} of size {size} does not divide over mesh {on}; "
        f"choose a multiple of {ways}."
    )


def weight_shardings(
    axes: trees.Tree, shapes: trees.Tree, mesh: jax.sharding.Mesh, rules: Rules | None = None
) -> dict[str, Any]:
    """A NamedSharding for every weight; `axes` and `shapes` are nested dicts of one structure."""
    rules = rules or Rules()
    return trees.map_with_path(
        lambda path, a, s: NamedSharding(mesh, rules.weight(a, s.shape, mesh, path)), axes, shapes
    )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh, rules: Rules | None = None) -> NamedSharding:
    """Of a [batch, seq] array."""
    rules = rules or Rules()
    axes = [
        tuple(n for n in rules.activations[a] if mesh.shape[n] > 1) or None
        for a in ("batch", "seq")
    ]
    return NamedSharding(mesh, PartitionSpec(*axes))


def batch_ways(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in ACTIVATIONS["batch"])


def token_axes(mesh: AnyMesh, rules: Rules | None = None) -> tuple[str, ...]:
    """The mesh axes, of several devices, over which tokens are split."""
    rules = rules or Rules()
    axes = rules.activations["batch"] + rules.activations["seq"]
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


_active: contextvars.ContextVar[tuple[jax.sharding.Mesh, Rules] | None] = contextvars.ContextVar(
    "mesh_and_rules", default=None
)


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh, rules: Rules | None = None) -> Iterator[None]:
    """Inside, `shard` constrains to this mesh. Wrap the call of the jitted function, where it is
    traced, not its declaration."""
    token = _active.set((mesh, rules or Rules()))
    try:
        yield
    finally:
        _active.reset(token)


_ONE_DEVICE = Mesh().abstract()


def active_mesh() -> jax.sharding.Mesh | None:
    """The mesh of the surrounding `use`, for code that needs shard_map; None outside, where there
    is one device."""
    active = _active.get()
    return active[0] if active else None


def partition(shape: Sequence[int], *axes: str) -> PartitionSpec:
    """How an activation of this shape lies on the mesh in use, for the specs of shard_map."""
    mesh, rules = _active.get()
    return rules.activation(axes, shape, mesh)


def shard(x: jax.Array, *axes: str) -> jax.Array:
    """Constrains `x` to the mesh by the logical names of its axes.

    Outside `use` it is the identity, but names are still checked.
    """
    active = _active.get()
    if active is None:
        _spec(ACTIVATIONS, axes, x.shape, _ONE_DEVICE, "activation")
        return x
    mesh, rules = active
    spec = rules.activation(axes, x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def shard_weight(w: jax.Array, *axes: str) -> jax.Array:
    """As `shard`, to the parts in which a weight is kept."""
    active = _active.get()
    if active is None:
        return w
    mesh, rules = active
    return jax.lax.with_sharding_constraint(
        w, NamedSharding(mesh, rules.weight(axes, w.shape, mesh))
    )
