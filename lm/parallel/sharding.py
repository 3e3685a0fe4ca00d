"""Shardings of weights and activations: two tables that map logical axis names to mesh axes.

A weight declares its logical axes beside its shape; an activation is constrained by
`shard(x, "batch", "seq", "embed")`. An unknown name, a mesh axis used twice in one array, or a size
that does not divide raises UserError.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas import dispatch
from lm import trees
from lm.errors import UserError, check_name, nearest
from lm.parallel.mesh import AXES, Mesh, Place

MeshAxes = tuple[str, ...]
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

# fsdp shards weights along the model width; tensor shards heads, feed-forward width and vocabulary
# (Megatron, arXiv:1909.08053). pipe shards stacked layers, and the model width of other weights.
WEIGHTS: Mapping[str, MeshAxes] = {
    "layers": ("pipe",),
    "vocab": ("tensor",),
    "embed": ("fsdp", "pipe"),  # lm.parallel.pipeline relies on this order
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "router": (),  # number of a router's outputs: small, read in full by every device
    "norm": (),  # vectors: too small to shard
    "rank": (),  # inner width of an adapter
    "score": (),  # the output of a scalar head
}
# Outside the pipeline (embedding, head, single layers) pipe shards the batch too.
ACTIVATIONS: Mapping[str, MeshAxes] = {
    "batch": ("pipe", "data", "fsdp", "expert"),
    "seq": ("context",),
    "keys": ("context",),  # the sequence of keys and values inside attention
    # Sequence of the residual stream and its norms: sequence parallelism (Korthikanti et al.,
    # arXiv:2205.05198). All-gathered before attention and feed-forward, reduce-scattered after.
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
    "rank": (),
    "score": (),
    "group": ("pipe", "data", "fsdp"),  # the batch, where the expert axis shards experts
    "capacity": (),
}
# Replicated where the mesh axis is a multiple of the size: with fewer key/value heads than tensor
# devices, each device holds all of them.
MAY_REPLICATE = ("kv_heads",)
# Mesh axes that are left out where the size does not divide. The pipeline moves weights that `pipe`
# does not shard to their stage.
WHERE_POSSIBLE = {"layers": "pipe", "embed": "pipe", "stream": "tensor"}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """{logical axis: mesh axes} for weights and for activations."""

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
        """PartitionSpec of a weight with these logical `axes` and this `shape`."""
        return _spec(self.weights, axes, shape, _sizes(mesh), path)

    def activation(self, axes: Sequence[str], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
        """PartitionSpec of an activation. Leaves out the manual axes of a surrounding shard_map."""
        return _spec(self.activations, axes, shape, _sizes(mesh), "activation")


def rules_for(place: Place) -> Rules:
    """The rules of a place."""
    weights, activations = WEIGHTS, ACTIVATIONS
    if place.mesh.pipe > 1:
        # Not sharded over tensor: XLA's partitioner (jax 0.10) crashes on MoE layers with a
        # capacity.
        activations = {**activations, "stream": ("context",)}
    if place.circular_repeats > 1:
        # A stage needs layers from all parts of the stack: pipe shards the model width instead, and
        # every step moves the weights to their stages.
        weights = {**WEIGHTS, "layers": ()}
    if place.context == "gather":
        activations = {**activations, "keys": ()}
    return Rules(weights=weights, activations=activations)


# For sequences of any length, as in generation: no axis shards the sequence.
UNSPLIT_SEQUENCE = Rules(activations={**ACTIVATIONS, "seq": (), "stream": ()})


def _spec(
    table: Mapping[str, MeshAxes],
    axes: Sequence[str],
    shape: Sequence[int],
    sizes: Mapping[str, int],
    what: str,
) -> PartitionSpec:
    """PartitionSpec by `table`. `sizes` are those of the mesh axes; `what` names the array in
    errors."""
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
                    f"{what}: axes {used[name]!r} and {axis!r} are both sharded over mesh axis "
                    f"{name!r}."
                )
            used[name] = axis
        parts.append(mesh_axes or None)
    return PartitionSpec(*parts)


def _dividing(
    mesh_axes: MeshAxes, axis: str, size: int, sizes: Mapping[str, int], what: str
) -> MeshAxes:
    """`mesh_axes`, checked to divide `size`; none where the axis may be replicated."""
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
    """A NamedSharding per array; `axes` and `shapes` are nested dicts of the same structure. A
    `trees.Leaf` has one for each of its arrays."""
    rules = rules or Rules()

    def of_weight(path: str, names: Sequence[str], weight: Any) -> Any:
        def of_array(names: Sequence[str], x: Any) -> NamedSharding:
            return NamedSharding(mesh, rules.weight(names, x.shape, mesh, path))

        is_leaf = isinstance(weight, trees.Leaf)
        return weight.of_arrays(of_array, names) if is_leaf else of_array(names, weight)

    return trees.map_with_path(of_weight, axes, shapes)


def split_over(part: str | MeshAxes | None) -> MeshAxes:
    """Mesh axes of one entry of a PartitionSpec: None, a name, or a tuple of names."""
    return (part,) if isinstance(part, str) else part or ()


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding with a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(
    mesh: jax.sharding.Mesh, rules: Rules | None = None, ndim: int = 2
) -> NamedSharding:
    """Sharding of an array of a batch: [batch, seq] if it has two dimensions, else [batch, ...]."""
    rules = rules or Rules()
    axes = [
        tuple(n for n in rules.activations[a] if mesh.shape[n] > 1) or None
        for a in ("batch", "seq")
    ]
    return NamedSharding(mesh, PartitionSpec(*axes[: 2 if ndim == 2 else 1]))


def batch_ways(mesh: jax.sharding.Mesh) -> int:
    """Number of shards of the batch."""
    return math.prod(mesh.shape[axis] for axis in ACTIVATIONS["batch"])


_active: contextvars.ContextVar[tuple[jax.sharding.Mesh, Rules] | None] = contextvars.ContextVar(
    "mesh_and_rules", default=None
)


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh, rules: Rules | None = None) -> Iterator[None]:
    """Context in which `shard` constrains to this mesh. Must surround the call of a jitted
    function, where it is traced."""
    token = _active.set((mesh, rules or Rules()))
    try:
        with dispatch.only(_platform(mesh)):
            yield
    finally:
        _active.reset(token)


def _platform(mesh: jax.sharding.Mesh) -> str | None:
    """Returns "cpu" for a mesh of CPUs, where tracing takes as long as compiling; else None."""
    devices = getattr(mesh, "devices", None)
    on_cpu = devices is not None and devices.flat[0].platform == "cpu"
    return "cpu" if on_cpu else None


_ONE_DEVICE = Mesh().abstract()


def active_mesh() -> jax.sharding.Mesh | None:
    """The mesh of the surrounding `use`, None outside."""
    active = _active.get()
    return active[0] if active else None


def partition(shape: Sequence[int], *axes: str) -> PartitionSpec:
    """PartitionSpec of an activation on the active mesh, for the specs of shard_map."""
    mesh, rules = _active.get()
    return rules.activation(axes, shape, mesh)


def is_sharded() -> bool:
    """Whether the active mesh has more than one device."""
    mesh = active_mesh()
    return mesh is not None and mesh.size > 1


def pipeline_parallel_size() -> int:
    """Size of the pipe axis of the active mesh, 1 without one."""
    mesh = active_mesh()
    return 1 if mesh is None else mesh.shape["pipe"]


def context_parallel_size() -> int:
    """Number of shards of a sequence on the active mesh."""
    active = _active.get()
    if active is None:
        return 1
    mesh, rules = active
    return math.prod(mesh.shape[name] for name in rules.activations["seq"])


def shard(x: jax.Array, *axes: str) -> jax.Array:
    """Constrains the sharding of `x` by the logical names of its axes.

    Outside `use` it returns `x`, but still checks the names.
    """
    active = _active.get()
    if active is None:
        _spec(ACTIVATIONS, axes, x.shape, _ONE_DEVICE.shape, "activation")
        return x
    mesh, rules = active
    spec = rules.activation(axes, x.shape, mesh)
    return constrain(x, spec)


def shard_rows(x: jax.Array) -> jax.Array:
    """Constrains an array of a batch to `batch_sharding`."""
    if x.ndim == 2 or _active.get() is None:
        return shard(x, *("batch", "seq")[: x.ndim]) if x.ndim <= 2 else x
    mesh, rules = _active.get()
    return constrain(x, batch_sharding(mesh, rules, x.ndim).spec)


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Constrains the sharding of `x` on the active mesh."""
    mesh, _ = _active.get()
    return jax.lax.with_sharding_constraint(x, NamedSharding(_context(mesh), spec))


def shard_weight(w: jax.Array, *axes: str) -> jax.Array:
    """`shard` for a weight."""
    return w if _active.get() is None else constrain(w, weight_partition(axes, w.shape))


def weight_partition(axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    """PartitionSpec of a weight on the active mesh, for the specs of `shard_map`."""
    mesh, rules = _active.get()
    return rules.weight(axes, shape, mesh)


def remaining(*mesh_axes: str) -> MeshAxes:
    """Those of the mesh axes that are not manual in a surrounding shard_map."""
    return tuple(name for name in mesh_axes if name not in _manual_axes())


def shard_map(
    function: Callable[..., Any],
    in_specs: Sequence[PartitionSpec],
    out_specs: Any,
    axes: Sequence[str] = AXES,
) -> Callable[..., Any]:
    """jax.shard_map over `axes` of the active mesh; inside another shard_map over the `remaining`
    ones, which alone may occur in the specs."""
    mesh = active_mesh()
    if mesh is None:
        raise ValueError("shard_map needs an active mesh: call it inside `sharding.use`")
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
    """The mesh that constraints and shard_map accept: inside a shard_map the abstract mesh, which
    marks manual axes."""
    return jax.sharding.get_abstract_mesh() if _manual_axes() else mesh
