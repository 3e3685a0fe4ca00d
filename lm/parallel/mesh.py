"""Mesh: number of devices per kind of parallelism. Place: a mesh with gradient accumulation,
activation checkpointing and offload."""

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

# Ordered by communication, least first: devices adjacent on the last axis are adjacent on the
# interconnect.
AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")

CONTEXT = ("ring", "gather")
REMAT = ("none", "dots", "attention", "block", "stage")
SUMS = ("float32", "bfloat16")
OFFLOAD = ("optimizer", "layers")
# Activations of a layer that `remat` can save by name.
SAVED = ("attention", "qkv", "attention_out", "ffn_hidden")

_TPU_PLACE = re.compile(r"(\d+x)?(v\d+[a-z]*|tpu\d+x)-\d+")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Number of devices per mesh axis.

    Args:
      data: data parallelism; weights are replicated.
      fsdp: data parallelism with sharded weights, gradients and optimizer state (FSDP, ZeRO-3).
      tensor: tensor parallelism: heads, feed-forward width and vocabulary are split.
      pipe: pipeline parallelism: layers are split into stages.
      expert: expert parallelism: the experts of an MoE are split.
      context: context parallelism: each sequence is split.
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
        """Number of shards of the batch; batch.sequences must be a multiple of it."""
        return self.pipe * self.data * self.fsdp * self.expert

    @classmethod
    def parse(cls, text: str) -> "Mesh":
        """'data=2,fsdp=4' -> Mesh(data=2, fsdp=4)."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = (word.strip() for word in part.partition("="))
            check_name("mesh axis", axis, AXES)
            if not (size.isascii() and size.isdecimal()):
                raise UserError(f"mesh axis {part.strip()!r} needs a whole number, as in data=2.")
            if axis in sizes:
                raise UserError(f"mesh axis {axis!r} is given twice in {text!r}.")
            sizes[axis] = int(size)
        return cls(**sizes)

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The jax mesh over the first `size` of `devices` (default: jax.devices()).

        Raises UserError when there are too few devices, or when a host would have none of them.
        """
        devices = jax.devices() if devices is None else list(devices)
        if self.size > len(devices):
            raise UserError(
                f"mesh {self} needs {self.size} devices and this machine has {len(devices)} "
                f"({devices[0].platform}). Choose a smaller mesh, or use virtual CPU devices:"
                f" XLA_FLAGS=--xla_force_host_platform_device_count={self.size}"
            )
        hosts = {device.process_index for device in devices}
        if {device.process_index for device in devices[: self.size]} != hosts:
            raise UserError(
                f"mesh {self} uses {self.size} of {len(devices)} devices and would leave some of "
                f"the {len(hosts)} hosts idle; choose a mesh of {len(devices)} devices."
            )
        return jax.sharding.Mesh(
            self._grid(devices[: self.size]),
            AXES,
            axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
        )

    def abstract(self) -> jax.sharding.AbstractMesh:
        """The mesh without devices, for checking shapes and shardings."""
        return jax.sharding.AbstractMesh(self.shape, AXES)

    def _grid(self, devices: Sequence[jax.Device]) -> np.ndarray:
        if devices[0].platform != "tpu":
            return np.array(devices).reshape(self.shape)
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        across = self.across(slices)
        within = [size // ways for size, ways in zip(self.shape, across, strict=True)]
        # allow_split_physical_axes: an axis size need not be a product of the torus dimensions.
        if slices == 1:
            return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )

    def across(self, slices: int) -> tuple[int, ...]:
        """Number of parts into which each axis is split over slices.

        The network between slices is slow, so the first of AXES, which communicate least, are
        split first. Raises UserError when the axis sizes do not divide over the slices.
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
    """A mesh, and how a step uses memory on it.

    Args:
      mesh: devices per axis.
      microbatches: gradient accumulation: the batch is split into this many micro-batches, computed
        one after another, and their gradients are summed. With mesh.pipe above 1 these are the
        micro-batches of the pipeline, and must be a multiple of mesh.pipe.
      circular_repeats: with mesh.pipe above 1, the number of groups of layers per pipeline stage.
        1 is GPipe; more (the circular, or interleaved, schedule) divide the bubble.
      context: with mesh.context above 1, how attention gets the keys and values of other devices.
        'ring' (ring attention) passes them from device to device, so that a device holds at most
        two shards; 'gather' all-gathers them first, which layers whose model.attention.sinks are
        FirstTokens always do.
      remat: activation checkpointing: what the forward pass saves for the backward pass, which
        recomputes the rest.
          'none'       everything except element-wise results
          'dots'       outputs of weight matmuls and of attention
          'attention'  each layer's input and the attention output
          'block'      each layer's input
          'stage'      the input of each pipeline stage's group of layers
        Or a tuple of names to save in addition to each layer's input: 'qkv' (queries, keys,
        values), 'attention' (its output and log-sum-exp), 'attention_out' (output projection),
        'ffn_hidden' (gate and up projections; not those of routed experts).
      accumulate: dtype in which gradients are summed over micro-batches. 'bfloat16' takes half the
        memory and loses what is below 1/256 of a sum.
      offload: what is kept in host memory while unused: 'optimizer' (its state, between updates),
        'layers' (each layer's input, from its forward to its backward pass).
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
                f"place.offload={self.offload!r}: 'layers' is not supported with mesh.pipe="
                f"{self.mesh.pipe}; leave it out, and use remat='stage' to save fewer activations."
            )
        if self.microbatches == 1 and self.accumulate != "float32":
            raise UserError(
                f"place.accumulate={self.accumulate!r} has no effect with "
                "place.microbatches=1; set more micro-batches, or leave accumulate out."
            )
        if self.mesh.pipe > 1 and self.microbatches % self.mesh.pipe:
            raise UserError(
                f"place.microbatches={self.microbatches} must be a multiple of mesh.pipe="
                f"{self.mesh.pipe}, the number of pipeline stages."
            )
        if self.mesh.pipe == 1 and self.circular_repeats > 1:
            raise UserError(
                f"place.circular_repeats={self.circular_repeats} is for pipelines; set mesh.pipe, "
                "or leave circular_repeats out."
            )
        if self.mesh.pipe == 1 and self.remat == "stage":
            raise UserError("place.remat='stage' is for pipelines; set mesh.pipe, or use 'block'.")


def check_remat(what: str, remat: str | tuple[str, ...]) -> None:
    """Raises UserError unless `remat` is in REMAT or a tuple of SAVED; `what` names the field."""
    if isinstance(remat, str):
        check_name(what, remat, REMAT)
        return
    if not remat:
        raise UserError(
            f"{what}=() names nothing to save; use 'block', which saves each layer's input."
        )
    for name in remat:
        check_name(what, name, SAVED)


def choose(
    places: Mapping[str, Place], on: str | None = None, mesh: Mesh | None = None
) -> tuple[str, Place]:
    """(name, place): the place called `on`, or the first that fits this machine.

    A place named after a TPU slice ('v5p-64', or '4xv5p-64' for four of them) fits only TPUs and
    must use all of them; any other fits where there are enough devices.

    Args:
      mesh: replaces the mesh of the place.

    Raises:
      UserError: `on` is unknown, or no place fits.
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
    """The place on another mesh, its micro-batches rounded up to a multiple of mesh.pipe."""
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
    needed = ", ".join(f"{name} ({place.mesh.size} devices)" for name, place in places.items())
    available = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
    return (
        f"No place fits this machine, which has {available}: {needed}. "
        "Give a mesh, as in --mesh data=1."
    )
