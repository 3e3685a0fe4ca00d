"""Where a run may happen: a Mesh says how many devices each kind of parallelism takes, a Place
how memory is spent there."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from lm.errors import UserError, check_name, check_positive

# Slow axes first: neighbours on the last axis are neighbours on the chip-to-chip links.
AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")

CONTEXT = ("ring", "gather")
REMAT = ("none", "dots", "attention", "block", "stage")
SUMS = ("float32", "bfloat16")
OFFLOAD = ("optimizer", "layers")
# What may be kept by name, of each layer.
KEPT = ("attention", "qkv", "attention_out", "ffn_hidden")

_TPU_PLACE = re.compile(r"(\d+x)?(v\d+[a-z]*|tpu\d+x)-\d+")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices per axis.

    `data` copies the weights, `fsdp` splits them, `tensor` splits each matrix product, `expert`
    the experts of an MoE; `pipe` splits the layers and `context` the sequence.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    pipe: int = 1
    expert: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        check_positive(**{f"mesh.{axis}": getattr(self, axis) for axis in AXES})

    @property
    def shape(self) -> tuple[int, ...]:
        """Devices per axis, in the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.shape)

    @property
    def batch_size(self) -> int:
        """Into how many parts a batch is split: its sequences must divide by it."""
        return self.pipe * self.data * self.fsdp * self.expert

    @classmethod
    def parse(cls, text: str) -> "Mesh":
        """'data=2,fsdp=4' -> Mesh(data=2, fsdp=4)."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = (word.strip() for word in part.partition("="))
            check_name("mesh axis", axis, AXES)
            if not size.isdigit():
                raise UserError(f"mesh axis {part.strip()!r} needs a whole number, as in data=2.")
            if axis in sizes:
                raise UserError(f"mesh axis {axis!r} is given twice in {text!r}.")
            sizes[axis] = int(size)
        return cls(**sizes)

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The jax mesh over the first `size` devices (default: all of jax.devices()).

        Raises UserError when there are too few devices, or when a host would be left without any.
        """
        devices = jax.devices() if devices is None else list(devices)
        if self.size > len(devices):
            raise UserError(
                f"mesh {self} needs {self.size} devices and this machine has {len(devices)} "
                f"({devices[0].platform}). Choose a smaller mesh, or try it on virtual CPU devices:"
                f" XLA_FLAGS=--xla_force_host_platform_device_count={self.size}"
            )
        hosts = {device.process_index for device in devices}
        if {device.process_index for device in devices[: self.size]} != hosts:
            raise UserError(
                f"mesh {self} takes {self.size} of {len(devices)} devices and would leave some of "
                f"the {len(hosts)} hosts idle; choose a mesh of {len(devices)} devices."
            )
        return jax.sharding.Mesh(
            self._grid(devices[: self.size]),
            AXES,
            axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
        )

    def abstract(self) -> jax.sharding.AbstractMesh:
        """The axes and their sizes without any devices: enough to check shapes against."""
        return jax.sharding.AbstractMesh(self.shape, AXES)

    def _grid(self, devices: Sequence[jax.Device]) -> np.ndarray:
        if devices[0].platform != "tpu":
            return np.array(devices).reshape(self.shape)
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        across = self.across(slices)
        within = [size // ways for size, ways in zip(self.shape, across, strict=True)]
        # A size that is no product of sides of the torus takes parts of them.
        if slices == 1:
            return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )

    def across(self, slices: int) -> tuple[int, ...]:
        """How many ways each axis is split over slices, which only a slow network joins: the first
        of AXES as far as possible, for their devices have the least to say to each other.

        Raises UserError where the axes do not come to so many parts.
        """
        ways, left = [], slices
        for size in self.shape:
            ways.append(math.gcd(size, left))
            left //= ways[-1]
        if left > 1:
            raise UserError(
                f"mesh {self} does not divide over {slices} slices; "
                f"choose mesh.data or mesh.pipe as a multiple of {slices}."
            )
        return tuple(ways)

    def __str__(self) -> str:
        sizes = zip(AXES, self.shape, strict=True)
        return ",".join(f"{axis}={size}" for axis, size in sizes if size > 1) or "data=1"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A mesh and how to spend its memory.

    Args:
      microbatches: into how many parts a step's batch is split. They are computed one after
        another, their gradients added up; with mesh.pipe above 1 they are what passes through the
        pipeline, and a multiple of mesh.pipe.
      circular_repeats: with mesh.pipe above 1, how often a micro-batch goes round the stages, each of which
        holds so many groups of layers: 1 is GPipe; more (the circular schedule) divide the bubble.
      context: with mesh.context above 1, how queries meet the keys and values of other devices:
        'ring' passes them round, so that a device holds no more than two parts; 'gather' fetches
        all of them first, as layers whose model.attention.sinks are FirstTokens always do.
      remat: which activations the backward pass computes anew: 'none' only element-wise work,
        'dots' all but the products with weights and attention's result, 'attention' all but each
        layer's input and attention's result, 'block' all but each layer's input, 'stage' all but
        the input of a pipeline stage's group of layers. Or the names of what is kept beside each
        layer's input: 'qkv' (what attention compares and mixes), 'attention' (its result and the
        logs of its softmax), 'attention_out' (after the output projection) and 'ffn_hidden' (the
        products with gate and up; not those of an MoE's routed experts).
      accumulate: the number format in which gradients are summed over micro-batches: 'bfloat16'
        takes half the memory, and loses what is below 1/256 of a sum.
      offload: what lies in the host's memory while it is not used: 'optimizer', its state, between
        updates; 'layers', the input of each layer, from its forward to its backward pass.
    """

    mesh: Mesh = Mesh()
    microbatches: int = 1
    circular_repeats: int = 1
    context: str = "ring"
    remat: str | tuple[str, ...] = "none"
    accumulate: str = "float32"
    offload: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        numbers = {"microbatches": self.microbatches, "circular_repeats": self.circular_repeats}
        check_positive(**{f"place.{name}": number for name, number in numbers.items()})
        check_remat("place.remat", self.remat)
        check_name("place.context", self.context, CONTEXT)
        check_name("place.accumulate", self.accumulate, SUMS)
        for name in self.offload:
            check_name("place.offload", name, OFFLOAD)
        if "layers" in self.offload and self.mesh.pipe > 1:
            raise UserError(
                f"place.offload={self.offload!r} moves no layers' inputs with mesh.pipe="
                f"{self.mesh.pipe}; leave 'layers' out, and use remat='stage' to keep fewer."
            )
        if self.microbatches == 1 and self.accumulate != "float32":
            raise UserError(
                f"place.accumulate={self.accumulate!r} has nothing to sum with "
                "place.microbatches=1; set more micro-batches, or leave accumulate out."
            )
        if self.mesh.pipe > 1 and self.microbatches % self.mesh.pipe:
            raise UserError(
                f"place.microbatches={self.microbatches} must be a multiple of mesh.pipe="
                f"{self.mesh.pipe}: micro-batches enter the pipeline in turns of as many."
            )
        if self.mesh.pipe == 1 and self.circular_repeats > 1:
            raise UserError(
                f"place.circular_repeats={self.circular_repeats} is for pipelines; set mesh.pipe, or leave circular_repeats out."
            )
        if self.mesh.pipe == 1 and self.remat == "stage":
            raise UserError("place.remat='stage' is for pipelines; set mesh.pipe, or use 'block'.")


def check_remat(what: str, remat: str | tuple[str, ...]) -> None:
    """Raises UserError unless `remat` is a policy, or names of what is kept."""
    if isinstance(remat, str):
        check_name(what, remat, REMAT)
        return
    if not remat:
        raise UserError(
            f"{what}=() names nothing to keep; use 'block', which keeps layers' inputs."
        )
    for name in remat:
        check_name(what, name, KEPT)


def choose(
    places: Mapping[str, Place], on: str | None = None, mesh: Mesh | None = None
) -> tuple[str, Place]:
    """The place called `on`, or else the first that fits this machine; `mesh` replaces its mesh.

    A place named after a TPU slice ('v5p-64', or '4xv5p-64' for four of them) fits only TPUs and
    only the whole of them; any other fits wherever there are enough devices.
    """
    if on is not None:
        check_name("--on", on, places)
        name = on
    elif mesh is not None:
        name = next((name for name in places if not _TPU_PLACE.fullmatch(name)), next(iter(places)))
    else:
        name = next((name for name, place in places.items() if _fits(name, place)), None)
        if name is None:
            raise UserError(_none_fits(places))
    place = places[name]
    return name, place if mesh is None else _with_mesh(place, mesh)


def _with_mesh(place: Place, mesh: Mesh) -> Place:
    """The place on another mesh, with as many micro-batches as its pipeline needs."""
    changes: dict[str, Any] = {"microbatches": math.lcm(place.microbatches, mesh.pipe)}
    if mesh.pipe == 1:
        changes |= {
            "circular_repeats": 1,
            "remat": "block" if place.remat == "stage" else place.remat,
        }
    return dataclasses.replace(place, mesh=mesh, **changes)


def _fits(name: str, place: Place) -> bool:
    if _TPU_PLACE.fullmatch(name):
        return jax.devices()[0].platform == "tpu" and place.mesh.size == jax.device_count()
    return place.mesh.size <= jax.device_count()


def _none_fits(places: Mapping[str, Place]) -> str:
    wanted = ", ".join(f"{name} ({place.mesh.size} devices)" for name, place in places.items())
    here = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
    return (
        f"No place fits this machine, which has {here}: {wanted}. Give a mesh, as in --mesh data=1."
    )
