"""Which device holds which part of an array: two tables from logical axis names to mesh axes, one
for weights, one for activations.

A weight's axes stand beside its shape where it is declared; an activation is constrained with
`shard(x, "batch", "seq", "embed")` at a handful of seams. An unknown name, a mesh axis used twice
in one array, or a size that does not divide raises.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lm import trees
from lm.errors import UserError, check_name, nearest
from lm.parallel.mesh import AXES, Mesh, Place

MeshAxes = tuple[str, ...]
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

# fsdp splits weights along the model width; tensor splits heads, feed-forward width and vocabulary
# (Megatron, arXiv:1909.08053). pipe splits a stack of layers, and the width of what is in none.
WEIGHTS: Mapping[str, MeshAxes] = {
    "layers": ("pipe",),
    "vocab": ("tensor",),
    "embed": ("fsdp", "pipe"),  # in this order: lm.parallel.pipeline takes pipe's parts together
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "router": (),  # a router's output width: small, and read whole by every device
    "norm": (),  # vectors: too small to be worth gathering
}
# Outside the pipeline (embedding, head, single layers) pipe is one more way to split the batch.
ACTIVATIONS: Mapping[str, MeshAxes] = {
    "batch": ("pipe", "data", "fsdp", "expert"),
    "seq": ("context",),
    "keys": ("context",),  # the sequence of keys and values, while queries meet them
    # The sequence in the residual stream and its norms (Korthikanti et al., arXiv:2205.05198):
    # gathered before attention and feed-forward, whose sums are scattered again.
    "stream": ("context", "tensor"),
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "router": (),
    "norm": (),
    "group": ("pipe", "data", "fsdp"),  # the batch, where the expert axis holds experts
    "capacity": (),
}
# With fewer key/value heads than tensor devices, each device keeps a copy of all of them.
MAY_REPLICATE = ("kv_heads",)
# Mesh axes that split a logical axis only where its size allows it. Of weights that `pipe` does not
# split, the pipeline brings each stage what it needs.
WHERE_POSSIBLE = {"layers": "pipe", "embed": "pipe", "stream": "tensor"}


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
        return _spec(self.weights, axes, shape, _sizes(mesh), path)

    def activation(self, axes: Sequence[str], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
        """The partition of an activation with these logical `axes` and this `shape`; inside a
        shard_map, over the mesh axes that it leaves to the compiler."""
        return _spec(self.activations, axes, shape, _sizes(mesh), "activation")


def rules_at(place: Place) -> Rules:
    """The rules of a place. A pipeline of several circular_repeats needs layers from all over the stack on
    each stage: there `pipe` splits the width of the stack's weights, and they are brought to their
    stage in every step. Within a pipeline `tensor` leaves the residual stream whole, since XLA's
    partitioner, of jax 0.10, ends the process over experts of a capacity that meet it in parts."""
    weights, activations = WEIGHTS, ACTIVATIONS
    if place.mesh.pipe > 1:
        activations = {**activations, "stream": ("context",)}
    if place.circular_repeats > 1:
        weights = {**WEIGHTS, "layers": ()}
    if place.context == "gather":
        activations = {**activations, "keys": ()}
    return Rules(weights=weights, activations=activations)


# For rows of any length, as in generation: no sequence is split.
WHOLE_ROWS = Rules(activations={**ACTIVATIONS, "seq": (), "stream": ()})


def _spec(
    table: Mapping[str, MeshAxes],
    axes: Sequence[str],
    shape: Sequence[int],
    sizes: Mapping[str, int],
    what: str,
) -> PartitionSpec:
    """`sizes` are those of the mesh axes."""
    if len(axes) != len(shape):
        raise UserError(
            f"{what} has shape {tuple(shape)} but axes {tuple(axes)}: "
            "one name per dimension is needed."
        )
    parts: list[MeshAxes | None] = []
    used: dict[str, str] = {}
    for axis, size in zip(axes, shape, strict=True):
        if axis not in table:
            raise UserError(f"{what} has the unknown logical axis {axis!r}.{nearest(axis, table)}")
        mesh_axes = tuple(name for name in table[axis] if sizes[name] > 1)
        ways = math.prod(sizes[name] for name in mesh_axes)
        optional = WHERE_POSSIBLE.get(axis)
        if optional in mesh_axes and (optional in used or size % ways):
            mesh_axes = tuple(name for name in mesh_axes if name != optional)
        mesh_axes = _dividing(mesh_axes, axis, size, sizes, what)
        for name in mesh_axes:
            if name in used:
                raise UserError(
                    f"{what}: axes {used[name]!r} and {axis!r} both lie on mesh axis {name!r}."
                )
            used[name] = axis
        parts.append(mesh_axes or None)
    return PartitionSpec(*parts)


def _dividing(
    mesh_axes: MeshAxes, axis: str, size: int, sizes: Mapping[str, int], what: str
) -> MeshAxes:
    """The mesh axes, over which `size` must divide."""
    ways = math.prod(sizes[name] for name in mesh_axes)
    if size % ways == 0:
        return mesh_axes
    if axis in MAY_REPLICATE and ways % size == 0:
        return ()
    on = " and ".join(f"{name}={sizes[name]}" for name in mesh_axes)
    raise UserError(
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


def split_over(part: str | MeshAxes | None) -> MeshAxes:
    """The mesh axes of one entry of a PartitionSpec, which writes a single one as a string."""
    return (part,) if isinstance(part, str) else part or ()


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
    """The mesh of the surrounding `use`; None outside, where there is one device."""
    active = _active.get()
    return active[0] if active else None


def partition(shape: Sequence[int], *axes: str) -> PartitionSpec:
    """How an activation of this shape lies on the mesh in use, for the specs of shard_map."""
    mesh, rules = _active.get()
    return rules.activation(axes, shape, mesh)


def is_sharded() -> bool:
    """Whether the mesh in use has more than one."""
    mesh = active_mesh()
    return mesh is not None and mesh.size > 1


def stages() -> int:
    """Devices along the pipe axis of the mesh in use."""
    mesh = active_mesh()
    return 1 if mesh is None else mesh.shape["pipe"]


def context_parallel_size() -> int:
    """Into how many parts a sequence is split on the mesh in use."""
    active = _active.get()
    if active is None:
        return 1
    mesh, rules = active
    return math.prod(mesh.shape[name] for name in rules.activations["seq"])


def shard(x: jax.Array, *axes: str) -> jax.Array:
    """Constrains `x` to the mesh by the logical names of its axes.

    Outside `use` it is the identity, but names are still checked.
    """
    active = _active.get()
    if active is None:
        _spec(ACTIVATIONS, axes, x.shape, _ONE_DEVICE.shape, "activation")
        return x
    mesh, rules = active
    spec = rules.activation(axes, x.shape, mesh)
    return constrain(x, spec)


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`x` partitioned in this way on the mesh in use."""
    mesh, _ = _active.get()
    return jax.lax.with_sharding_constraint(x, NamedSharding(_context(mesh), spec))


def shard_weight(w: jax.Array, *axes: str) -> jax.Array:
    """As `shard`, to the parts in which a weight is kept."""
    return w if _active.get() is None else constrain(w, weight_partition(axes, w.shape))


def weight_partition(axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    """How a weight with these axes lies on the mesh in use, for the specs of `shard_map`."""
    mesh, rules = _active.get()
    return rules.weight(axes, shape, mesh)


def remaining(*mesh_axes: str) -> MeshAxes:
    """Those of the mesh axes that no surrounding shard_map has taken into its own hands."""
    return tuple(name for name in mesh_axes if name not in _manual_axes())


def shard_map(
    function: Callable[..., Any],
    in_specs: Sequence[PartitionSpec],
    out_specs: Any,
    axes: Sequence[str] = AXES,
) -> Callable[..., Any]:
    """jax.shard_map over these axes of the mesh in use; inside another shard_map, over the
    `remaining` ones, of which alone the specs may speak."""
    mesh = active_mesh()
    if mesh is None:
        raise ValueError("there are no devices to map over outside `sharding.use`")
    return jax.shard_map(
        function,
        mesh=_context(mesh),
        in_specs=tuple(in_specs),
        out_specs=out_specs,
        axis_names=set(remaining(*axes)),
    )


def _sizes(mesh: AnyMesh) -> dict[str, int]:
    manual = _manual_axes()
    return {name: 1 if name in manual else size for name, size in mesh.shape.items()}


def _manual_axes() -> frozenset[str]:
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def _context(mesh: jax.sharding.Mesh) -> AnyMesh:
    """The mesh as constraints and shard_map take it here: inside a shard_map, the one that says
    so."""
    return jax.sharding.get_abstract_mesh() if _manual_axes() else mesh
