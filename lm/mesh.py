"""Where a run may happen: a Mesh says how many devices each kind of parallelism takes, a Place
how memory is spent there."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils

from lm.errors import Refused, check_name, check_positive

# Slow axes first: neighbours on the last axis are neighbours on the chip-to-chip links.
AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")

REMAT = ("none", "dots", "block")

_TPU_PLACE = re.compile(r"(v\d+[a-z]*|tpu\d+x)-\d+")


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
        # Pipelines and ring attention are not built; an axis that did nothing would copy work.
        for axis in ("pipe", "context"):
            if getattr(self, axis) > 1:
                raise Refused(
                    f"mesh.{axis}={getattr(self, axis)} is not available yet; "
                    "use data, fsdp, tensor or expert."
                )

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
        return self.data * self.fsdp * self.expert

    @classmethod
    def parse(cls, text: str) -> "Mesh":
        """'data=2,fsdp=4' -> Mesh(data=2, fsdp=4)."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = (word.strip() for word in part.partition("="))
            check_name("mesh axis", axis, AXES)
            if not size.isdigit():
                raise Refused(f"mesh axis {part.strip()!r} needs a whole number, as in data=2.")
            if axis in sizes:
                raise Refused(f"mesh axis {axis!r} is given twice in {text!r}.")
            sizes[axis] = int(size)
        return cls(**sizes)

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The jax mesh over the first `size` devices (default: all of jax.devices()).

        Raises Refused when there are too few devices, or when a host would be left without any.
        """
        devices = jax.devices() if devices is None else list(devices)
        if self.size > len(devices):
            raise Refused(
                f"mesh {self} needs {self.size} devices and this machine has {len(devices)} "
                f"({devices[0].platform}). Choose a smaller mesh, or try it on virtual CPU devices:"
                f" XLA_FLAGS=--xla_force_host_platform_device_count={self.size}"
            )
        hosts = {device.process_index for device in devices}
        if {device.process_index for device in devices[: self.size]} != hosts:
            raise Refused(
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
        if devices[0].platform == "tpu":
            # A size that is no product of sides of the torus takes parts of them.
            return mesh_utils.create_device_mesh(
                self.shape, devices, allow_split_physical_axes=True
            )
        return np.array(devices).reshape(self.shape)

    def __str__(self) -> str:
        sizes = zip(AXES, self.shape, strict=True)
        return ",".join(f"{axis}={size}" for axis, size in sizes if size > 1) or "data=1"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A mesh and how to spend its memory.

    `microbatches` per step; `remat` says which activations the backward pass computes anew:
    'none' only element-wise work, 'dots' all but the products with weights, 'block' all but each
    layer's input.
    """

    mesh: Mesh = Mesh()
    microbatches: int = 1
    remat: str = "none"

    def __post_init__(self) -> None:
        check_positive(**{"place.microbatches": self.microbatches})
        check_name("place.remat", self.remat, REMAT)


def choose(
    places: Mapping[str, Place], on: str | None = None, mesh: Mesh | None = None
) -> tuple[str, Place]:
    """The place called `on`, or else the first that fits this machine; `mesh` replaces its mesh.

    A place named after a TPU slice ('v5p-64') fits only TPUs and only the whole of them; any other
    fits wherever there are enough devices.
    """
    if on is not None:
        check_name("--on", on, places)
        name = on
    elif mesh is not None:
        name = next((name for name in places if not _TPU_PLACE.fullmatch(name)), next(iter(places)))
    else:
        name = next((name for name, place in places.items() if _fits(name, place)), None)
        if name is None:
            raise Refused(_none_fits(places))
    place = places[name]
    return name, place if mesh is None else dataclasses.replace(place, mesh=mesh)


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
