"""TPU slices by name: 'v5p-64' is 32 chips in a torus of 2 x 4 x 4, '4xv5p-64' are four of these,
joined by a network."""

import itertools
import math
import re
from dataclasses import dataclass

from lm.errors import UserError
from lm.parallel import hardware

NAME = re.compile(r"(?:(\d+)x)?(v\d+[a-z]*|tpu\d+x)-(\d+)")
KNOWN = {name: chip for name, chip in hardware.CHIPS.items() if chip.dims}
HOST = 4  # chips on the smallest host that takes part in a slice


@dataclass(frozen=True)
class Slice:
    """`count` slices, each of `shape` in chips; `devices` as jax counts them."""

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
        return self.chips * self.chip.devices

    @property
    def topology(self) -> str:
        """Of one slice, as libtpu calls it: 'v5p:2x4x4'."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    def rings(self) -> tuple[bool, ...]:
        """Whether each dimension is closed to a ring."""
        return tuple(size % self.chip.ring == 0 for size in self.shape)


def find(name: str) -> Slice:
    """The slice of a name as Google Cloud gives it: the number counts cores on v5p and tpu7x, two
    to a chip, and chips on v5e and v6e; '4x' before it stands for four such slices. Raises UserError
    where there is none."""
    found = NAME.fullmatch(name)
    if not found or found.group(2) not in KNOWN:
        raise UserError(
            f"--on {name!r} is not a TPU slice that can be planned for; name one as in v5e-256, "
            "v5p-64, v6e-256 or tpu7x-128."
        )
    count, generation, number = int(found.group(1) or 1), found.group(2), int(found.group(3))
    chip = KNOWN[generation]
    shape = _shape(number // chip.cores, chip) if number % chip.cores == 0 else None
    if shape is None or not count:
        near = min(_numbers(chip), key=lambda n: abs(n - number))
        counted = "cores, two to a chip" if chip.cores == 2 else "chips"
        raise UserError(
            f"--on {name!r}: there is no such slice; the number counts {counted}. "
            f"The nearest is {generation}-{near}."
        )
    return Slice(name, generation, shape, count)


def _shape(chips: int, chip: hardware.Chip) -> tuple[int, ...] | None:
    """The squarest torus of so many chips, or None. Sides are 1, 2 or multiples of 4, which is how
    slices are cut, and of at most 16 on chips with two dimensions."""
    longest = 16 if chip.dims == 2 else 64
    sides = [1, 2, *range(4, longest + 1, 4)]
    if chip.dims == 2:
        shapes = [(a, chips // a) for a in sides if chips % a == 0]
    else:
        pairs = itertools.combinations_with_replacement(sides, 2)
        shapes = [(a, b, chips // (a * b)) for a, b in pairs if chips % (a * b) == 0]
    fits = [s for s in shapes if list(s) == sorted(s) and s[-1] in sides and chips % HOST == 0]
    best = min(fits, key=lambda s: (max(s) - min(s), sum(s)), default=None)
    # Four chips of a three-dimensional torus lie in a square.
    return (2, 2, 1) if best and chips == HOST and chip.dims == 3 else best


def _numbers(chip: hardware.Chip) -> list[int]:
    largest = 256 if chip.dims == 2 else 9216
    return [n * chip.cores for n in range(HOST, largest + 1, HOST) if _shape(n, chip)]
