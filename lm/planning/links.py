"""Collectives of a compiled program: which mesh axes they cross, how often they run, what they
move, and how long the chip's links need for it."""

import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lm.planning.hlo import Instruction, Program
from lm.planning.slices import Slice

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
HOP = 1e-6  # seconds from chip to chip, the order of magnitude (jax-ml.github.io/scaling-book)

_OPS = {kind: kind for kind in KINDS} | {f"{kind}-start": kind for kind in KINDS}
_OPS["ragged-all-to-all"] = "all-to-all"


class Collective(NamedTuple):
    """All collectives of one kind over the same axes in the same format.

    count    a step
    nbytes   per device and step: what each gathers, what each has summed, what each sends
    seconds  on the links, one after another
    hidden   seconds of those that the compiler started early, so that work can go on meanwhile
    """

    kind: str
    axes: str
    dtype: str
    count: int
    nbytes: int
    seconds: float
    hidden: float


class Layout:
    """Where the devices of a mesh sit on the torus: `grid` holds them by mesh coordinates. Of
    several slices, the first: `across` is how many ways each axis is split over them."""

    def __init__(
        self, grid: np.ndarray, axes: Sequence[str], where: Slice, across: Sequence[int] = ()
    ):
        self.axes, self.slice = tuple(axes), where
        self.across = tuple(across) or (1,) * grid.ndim
        within = [n // ways for n, ways in zip(grid.shape, self.across, strict=True)]
        grid = grid[tuple(slice(n) for n in within)]
        self.shape = grid.shape
        self.coords = np.array([device.coords for device in grid.flat])

    def crossed(self, groups: np.ndarray) -> str:
        """The axes along which the members of a group differ, as 'fsdp' or 'data+fsdp'."""
        places = np.stack(np.unravel_index(groups[0], self.shape))
        differ = (places != places[:, :1]).any(axis=1)
        return "+".join(a for a, d in zip(self.axes, differ, strict=True) if d)

    def between_slices(self) -> str:
        """The axes that are split over slices."""
        return "+".join(a for a, n in zip(self.axes, self.across, strict=True) if n > 1)

    def sides(self, group: np.ndarray) -> list[tuple[int, bool]]:
        """For each dimension of the torus in which a group extends: how many places it takes, and
        whether they close to a ring."""
        coords = self.coords[group]
        extents = [len(set(column)) for column in coords.T]
        rings, shape = self.slice.rings(), self.slice.shape
        return [
            (n, n == shape[i] and i < len(rings) and rings[i])
            for i, n in enumerate(extents)
            if n > 1
        ]

    def route(self, pairs: np.ndarray) -> tuple[int, int]:
        """(links on the longest way from source to target, ways through the busiest link), each way
        going through one dimension after another, and the shorter way round a ring."""
        at, target = self.coords[pairs[:, 0]].copy(), self.coords[pairs[:, 1]]
        sides = zip(self.slice.shape, self.slice.rings(), strict=True)
        longest = np.zeros(len(pairs), int)
        ways: dict[tuple[int, ...], int] = {}
        for dim, (size, ring) in enumerate(sides):
            apart = target[:, dim] - at[:, dim]
            if ring:
                apart = (apart + size // 2) % size - size // 2
            longest += abs(apart)
            for step in range(abs(apart).max(initial=0)):
                moving = abs(apart) > step
                forward = np.sign(apart[moving])
                for place, sign in zip(at[moving].tolist(), forward.tolist(), strict=True):
                    link = (*place, dim, sign)
                    ways[link] = ways.get(link, 0) + 1
                at[moving, dim] = (at[moving, dim] + forward) % size
        return int(longest.max(initial=0)), max(ways.values(), default=0)


def seconds(kind: str, nbytes: int, sides: Sequence[tuple[int, bool]], link: float) -> float:
    """How long a collective over a group takes on its links.

    All dimensions of the torus that the group extends in work at once, each with the links of both
    directions where it is a ring and of one where it is a line. Gathering and scattering move
    (n-1)/n of the array into every chip; summing does both. An exchange of all with all fills the
    links that cut the group in halves: two each way in a ring, one in a line.
    """
    if not sides or not nbytes:
        return 0.0
    n = math.prod(size for size, _ in sides)
    latency = HOP * sum(size // 2 if ring else size - 1 for size, ring in sides)
    if kind == "all-to-all":
        return latency + nbytes * max(n / 8 if ring else n / 4 for n, ring in sides) / link
    rate = link * sum(2 if ring else 1 for _, ring in sides)
    passes = 2 if kind == "all-reduce" else 1
    return passes * (latency + nbytes * (n - 1) / n / rate)


def _between_slices(kind: str, nbytes: int, where: Slice) -> float:
    """Seconds of a collective that every device of a slice has with its peers in all others."""
    passes = 2 if kind == "all-reduce" else 1
    network = where.chip.network / where.chip.devices
    return passes * nbytes * (where.count - 1) / where.count / network


def collectives(program: Program, layout: Layout) -> list[Collective]:
    """Those of a step, the slowest first."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for kind, each, times, early in _executed(program):
        axes, nbytes, one = _one(kind, each, layout)
        if not axes:
            continue
        # The start of an asynchronous one lists its operand beside its result.
        dtype = max(each.arrays, key=lambda a: a.nbytes).dtype
        total = found.setdefault((kind, axes, dtype), [0, 0, 0.0, 0.0])
        for i, amount in enumerate((1, nbytes, one, one if early else 0.0)):
            total[i] += times * amount
    rows = [Collective(*key, int(n), int(b), s, h) for key, (n, b, s, h) in found.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def _one(kind: str, each: Instruction, layout: Layout) -> tuple[str, int, float]:
    """(axes, bytes, seconds) of one collective; no axes where it goes nowhere."""
    link = layout.slice.chip.link
    if each.op == "recv":
        nbytes = each.arrays[0].nbytes
        return layout.between_slices(), nbytes, _between_slices(kind, nbytes, layout.slice)
    if kind == "collective-permute":
        nbytes = sum(a.nbytes for a in each.arrays[: max(1, len(each.operands))])
        axes, hops, ways = _permuted(each.attribute("source_target_pairs"), layout)
        return axes, nbytes, hops * HOP + ways * nbytes / link
    groups = replica_groups(each.rest, len(layout.coords))
    if groups.shape[1] < 2:
        return "", 0, 0.0
    results = each.arrays[len(each.operands) :] if each.op.endswith("-start") else each.arrays
    nbytes = sum(a.nbytes for a in results) or max(a.nbytes for a in each.arrays)
    return layout.crossed(groups), nbytes, seconds(kind, nbytes, layout.sides(groups[0]), link)


@functools.lru_cache(maxsize=4096)
def _permuted(written: str, layout: Layout) -> tuple[str, int, int]:
    """(axes, links on the longest way, ways through the busiest link); cores of one chip have a
    link to themselves."""
    pairs = np.array(_numbers(written)).reshape(-1, 2)
    if not len(pairs):
        return "", 0, 0
    hops, ways = layout.route(pairs)
    return layout.crossed(pairs), max(hops, 1), max(ways, 1)


def _executed(program: Program) -> Iterator[tuple[str, Instruction, int, bool]]:
    """(kind, instruction, times, whether started early). A TPU's reduce-scatter is an all-reduce in
    a fusion of that name; an early all-gather is a pair of fusions, of which the first counts, or,
    on chips whose sparse cores see to it, a computation that is called and waited for later. A
    ragged exchange moves what its smaller side holds: the other is a buffer for uneven loads."""
    called = {
        name
        for body in program.computations.values()
        for each in body
        if each.op == "call-start"
        for name in each.called
    }
    for each, computation, times, _ in program.executed():
        kind = _OPS.get(each.op) or _transfer(each)
        if (
            kind is None
            or "collective-done" in computation
            or "async_collective_done" in computation
        ):
            continue
        if kind == "all-reduce" and "reduce-scatter" in computation:
            kind = "reduce-scatter"
        if each.op == "ragged-all-to-all":
            sides = each, program.by_name[computation][each.operands[0]]
            each = replace(each, shape=min(sides, key=lambda i: i.arrays[0].nbytes).shape)
        early = each.op == "recv" or each.op.endswith("-start") or "async" in computation
        early = early or computation in called
        yield kind, each, times, early


def _transfer(each: Instruction) -> str | None:
    """The kind of collective between slices of which this is the receiving end."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', each.rest)
    if each.op != "recv" or not found:
        return None
    kind = found.group(1).lower().replace("_", "-")
    return kind if kind in KINDS else "collective-permute"


_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]*)\](?:T\(([\d,]*)\))?\))? \{([^}]*)\}"
)


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """[groups, members] from any of the forms in which HLO writes them; one group of all when it
    writes none."""
    if found := _MESH_GROUPS.search(attributes):
        written, dims, order, over = found.groups()
        sizes = {name: int(n) for name, n in re.findall(r"'([\w.]+)'=(\d+)", written)}
        ids = np.arange(math.prod(sizes.values()))
        if dims:
            ids = ids.reshape(_numbers(dims)).transpose(_numbers(order) or None)
        names, moved = list(sizes), re.findall(r"'([\w.]+)'", over)
        kept = [i for i, name in enumerate(names) if name not in moved]
        last = [names.index(name) for name in moved]
        members = math.prod(sizes[name] for name in moved)
        return ids.reshape(list(sizes.values())).transpose(kept + last).reshape(-1, members)
    if found := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, dims, order = ([int(n) for n in (g or "").split(",") if n] for g in found.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape)
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", attributes):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found.group(1))])
    return np.arange(devices).reshape(1, -1)


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]
