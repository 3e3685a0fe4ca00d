"""TPU slices by name: 'v5p-64' has 32 chips in a torus of 2 x 4 x 4; '4xv5p-64' is four such
slices, connected by the data-center network."""

import itertools
import math
import re
from dataclasses import dataclass

from lm.errors import UserError
from lm.parallel import hardware

NAME = re.compile(r"(?:(\d+)x)?(v\d+[a-z]*|tpu\d+x)-(\d+)")
KNOWN = {name: chip for name, chip in hardware.CHIPS.items() if chip.dims}
HOST = 4  # chips of the smallest host in a slice


@dataclass(frozen=True)
class Slice:
    """`count` slices, each a torus of `shape` chips."""

    name: str
    generation: str
    shape: tuple[int, ...]
    count: int = 1

    @property
    def chip(self) -> hardware.Chip:
        return KNOWN[self.generation]

    @property
    def chips(self) -> int:
        return self.count * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Number of jax devices."""
        return self.chips * self.chip.devices

    @property
    def topology(self) -> str:
        """libtpu's name of one slice, such as 'v5p:2x4x4'."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    def rings(self) -> tuple[bool, ...]:
        """Whether each dimension of the torus is a ring."""
        return tuple(size % self.chip.ring == 0 for size in self.shape)


def find(name: str) -> Slice:
    """The slice of this name, by Google Cloud's naming.

    The number counts cores on v5p and tpu7x (two per chip), chips on v5e and v6e. A prefix '4x'
    means four such slices. Raises UserError if there is no such slice.
    """
    match = NAME.fullmatch(name)
    if not match or match.group(2) not in KNOWN:
        raise UserError(
            f"--on {name!r} is not a supported TPU slice; examples: v5e-256, v5p-64, v6e-256, "
            "tpu7x-128."
        )
    count, generation, number = int(match.group(1) or 1), match.group(2), int(match.group(3))
    chip = KNOWN[generation]
    shape = _shape(number // chip.cores, chip) if number % chip.cores == 0 else None
    if shape is None or not count:
        nearest = min(_numbers(chip), key=lambda n: abs(n - number))
        unit = "cores, two per chip" if chip.cores == 2 else "chips"
        raise UserError(
            f"--on {name!r}: there is no such slice; the number counts {unit}. "
            f"The nearest is {generation}-{nearest}."
        )
    return Slice(name, generation, shape, count)


def _shape(chips: int, chip: hardware.Chip) -> tuple[int, ...] | None:
    """The most cubic torus of this number of chips, or None. Google Cloud's slices have sides of 1,
    2 or a multiple of 4, and of at most 16 on chips with two dimensions."""
    longest = 16 if chip.dims == 2 else 64
    sides = [1, 2, *range(4, longest + 1, 4)]
    if chip.dims == 2:
        shapes = [(a, chips // a) for a in sides if chips % a == 0]
    else:
        pairs = itertools.combinations_with_replacement(sides, 2)
        shapes = [(a, b, chips // (a * b)) for a, b in pairs if chips % (a * b) == 0]
    fits = [s for s in shapes if list(s) == sorted(s) and s[-1] in sides and chips % HOST == 0]
    best = min(fits, key=lambda s: (max(s) - min(s), sum(s)), default=None)
    # Four chips of a three-dimensional torus form a square.
    return (2, 2, 1) if best and chips == HOST and chip.dims == 3 else best


def _numbers(chip: hardware.Chip) -> list[int]:
    """All numbers in the names of slices of this chip."""
    largest = 256 if chip.dims == 2 else 9216
    return [n * chip.cores for n in range(HOST, largest + 1, HOST) if _shape(n, chip)]
