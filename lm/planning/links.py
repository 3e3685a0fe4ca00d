"""Collectives of a compiled program: mesh axes, count, bytes, and time on the chip's links."""

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
HOP = 1e-6  # latency of a link in seconds, order of magnitude (jax-ml.github.io/scaling-book)

_OPS = {kind: kind for kind in KINDS} | {f"{kind}-start": kind for kind in KINDS}
_OPS["ragged-all-to-all"] = "all-to-all"


class Collective(NamedTuple):
    """All collectives of one kind, over the same mesh axes and of the same dtype, in a step.

    count    number per step
    nbytes   per device and step: size of the gathered or reduced arrays, or bytes sent
    seconds  time on the links, without overlap between collectives
    hidden   the part of `seconds` that the compiler started asynchronously, so that it can overlap
             with computation
    """

    kind: str
    axes: str
    dtype: str
    count: int
    nbytes: int
    seconds: float
    hidden: float


class Layout:
    """Coordinates on the torus of the devices of a mesh; with several slices, of the first.

    Args:
      grid: devices by mesh coordinates.
      axes: names of the mesh axes.
      across: number of parts into which each axis is split over slices.
    """

    def __init__(
        self, grid: np.ndarray, axes: Sequence[str], tpu_slice: Slice, across: Sequence[int] = ()
    ):
        self.axes, self.slice = tuple(axes), tpu_slice
        self.across = tuple(across) or (1,) * grid.ndim
        within = [n // ways for n, ways in zip(grid.shape, self.across, strict=True)]
        grid = grid[tuple(slice(n) for n in within)]
        self.shape = grid.shape
        self.coords = np.array([device.coords for device in grid.flat])

    def crossed(self, groups: np.ndarray) -> str:
        """Mesh axes that a group of devices spans, such as 'fsdp' or 'data+fsdp'."""
        indices = np.stack(np.unravel_index(groups[0], self.shape))
        differ = (indices != indices[:, :1]).any(axis=1)
        return "+".join(a for a, d in zip(self.axes, differ, strict=True) if d)

    def between_slices(self) -> str:
        """Mesh axes that are split over slices."""
        return "+".join(a for a, n in zip(self.axes, self.across, strict=True) if n > 1)

    def sides(self, group: np.ndarray) -> list[tuple[int, bool]]:
        """(size, whether it is a ring) of each torus dimension that a group spans."""
        coords = self.coords[group]
        extents = [len(set(column)) for column in coords.T]
        rings, shape = self.slice.rings(), self.slice.shape
        return [
            (n, n == shape[i] and i < len(rings) and rings[i])
            for i, n in enumerate(extents)
            if n > 1
        ]

    def route(self, pairs: np.ndarray) -> tuple[int, int]:
        """(links on the longest path from source to target, paths through the busiest link). A path
        takes one dimension after another, and the shorter direction of a ring."""
        at, target = self.coords[pairs[:, 0]].copy(), self.coords[pairs[:, 1]]
        sides = zip(self.slice.shape, self.slice.rings(), strict=True)
        longest = np.zeros(len(pairs), int)
        paths: dict[tuple[int, ...], int] = {}
        for dim, (size, ring) in enumerate(sides):
            distance = target[:, dim] - at[:, dim]
            if ring:
                distance = (distance + size // 2) % size - size // 2
            longest += abs(distance)
            for step in range(abs(distance).max(initial=0)):
                moving = abs(distance) > step
                direction = np.sign(distance[moving])
                for chip, sign in zip(at[moving].tolist(), direction.tolist(), strict=True):
                    link = (*chip, dim, sign)
                    paths[link] = paths.get(link, 0) + 1
                at[moving, dim] = (at[moving, dim] + direction) % size
        return int(longest.max(initial=0)), max(paths.values(), default=0)


def seconds(kind: str, nbytes: int, sides: Sequence[tuple[int, bool]], link: float) -> float:
    """Time of a collective within a slice.

    All torus dimensions that the group spans are used at once: both directions of a ring, one of a
    line. All-gather and reduce-scatter move (n-1)/n of the array into every chip; all-reduce does
    both. An all-to-all is limited by the links that bisect the group: two per direction in a ring,
    one in a line.

    Args:
      nbytes: size of the gathered or reduced array, or bytes that each device sends.
      sides: (size, whether it is a ring) of each torus dimension that the group spans.
      link: bytes/s of a link in one direction.
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


def _between_slices(kind: str, nbytes: int, tpu_slice: Slice) -> float:
    """Seconds of a collective between the corresponding devices of all slices."""
    passes = 2 if kind == "all-reduce" else 1
    network = tpu_slice.chip.network / tpu_slice.chip.devices
    return passes * nbytes * (tpu_slice.count - 1) / tpu_slice.count / network


def collectives(program: Program, layout: Layout) -> list[Collective]:
    """Collectives of a step, the slowest first."""
    totals: dict[tuple[str, str, str], list[float]] = {}
    for kind, each, times, asynchronous in _executed(program):
        axes, nbytes, one = _one(kind, each, layout)
        if not axes:
            continue
        # The start of an asynchronous collective lists its operand beside its result.
        dtype = max(each.arrays, key=lambda a: a.nbytes).dtype
        total = totals.setdefault((kind, axes, dtype), [0, 0, 0.0, 0.0])
        for i, amount in enumerate((1, nbytes, one, one if asynchronous else 0.0)):
            total[i] += times * amount
    rows = [Collective(*key, int(n), int(b), s, h) for key, (n, b, s, h) in totals.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def _one(kind: str, each: Instruction, layout: Layout) -> tuple[str, int, float]:
    """(axes, bytes, seconds) of one collective; axes are '' for a group of one device."""
    link = layout.slice.chip.link
    if each.op == "recv":
        nbytes = each.arrays[0].nbytes
        return layout.between_slices(), nbytes, _between_slices(kind, nbytes, layout.slice)
    if kind == "collective-permute":
        nbytes = sum(a.nbytes for a in each.arrays[: max(1, len(each.operands))])
        axes, hops, paths = _permuted(each.attribute("source_target_pairs"), layout)
        return axes, nbytes, hops * HOP + paths * nbytes / link
    groups = replica_groups(each.rest, len(layout.coords))
    if groups.shape[1] < 2:
        return "", 0, 0.0
    results = each.arrays[len(each.operands) :] if each.op.endswith("-start") else each.arrays
    nbytes = sum(a.nbytes for a in results) or max(a.nbytes for a in each.arrays)
    return layout.crossed(groups), nbytes, seconds(kind, nbytes, layout.sides(groups[0]), link)


@functools.lru_cache(maxsize=4096)
def _permuted(source_target_pairs: str, layout: Layout) -> tuple[str, int, int]:
    """(axes, links on the longest path, paths through the busiest link). Two cores of one chip
    count as connected by a link of their own."""
    pairs = np.array(_numbers(source_target_pairs)).reshape(-1, 2)
    if not len(pairs):
        return "", 0, 0
    hops, paths = layout.route(pairs)
    return layout.crossed(pairs), max(hops, 1), max(paths, 1)


def _executed(program: Program) -> Iterator[tuple[str, Instruction, int, bool]]:
    """Yields (kind, instruction, times, whether asynchronous) of every executed collective.

    On TPUs a reduce-scatter is an all-reduce in a fusion of that name. An asynchronous all-gather
    is a pair of fusions, of which the first counts, or, where sparse cores execute it, a
    computation started by call-start. A ragged all-to-all moves the smaller of its two arrays: the
    other is a buffer for uneven loads.
    """
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
        asynchronous = each.op == "recv" or each.op.endswith("-start") or "async" in computation
        asynchronous = asynchronous or computation in called
        yield kind, each, times, asynchronous


def _transfer(each: Instruction) -> str | None:
    """Kind of the collective between slices whose receiving end this is, None for others."""
    match = re.search(r'_xla_megascale_transfer_type="(\w+)"', each.rest)
    if each.op != "recv" or not match:
        return None
    kind = match.group(1).lower().replace("_", "-")
    return kind if kind in KINDS else "collective-permute"


_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]*)\](?:T\(([\d,]*)\))?\))? \{([^}]*)\}"
)


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Parses replica groups, [groups, members], in any notation of HLO; without them, one group of
    all devices."""
    if match := _MESH_GROUPS.search(attributes):
        mesh, dims, order, over = match.groups()
        sizes = {name: int(n) for name, n in re.findall(r"'([\w.]+)'=(\d+)", mesh)}
        ids = np.arange(math.prod(sizes.values()))
        if dims:
            ids = ids.reshape(_numbers(dims)).transpose(_numbers(order) or None)
        names, spanned = list(sizes), re.findall(r"'([\w.]+)'", over)
        first = [i for i, name in enumerate(names) if name not in spanned]
        last = [names.index(name) for name in spanned]
        members = math.prod(sizes[name] for name in spanned)
        return ids.reshape(list(sizes.values())).transpose(first + last).reshape(-1, members)
    if match := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, dims, order = ([int(n) for n in (g or "").split(",") if n] for g in match.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape)
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", attributes):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]*)\}", match.group(1))])
    return np.arange(devices).reshape(1, -1)


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]
