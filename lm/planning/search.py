"""Searches the places of an experiment on a slice: all by estimate, the best few by compiling."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from lm import terminal
from lm.errors import UserError
from lm.experiment import Experiment
from lm.parallel.mesh import REMAT, Mesh, Place
from lm.planning import report, slices
from lm.planning.estimate import Estimate, estimate, state_at
from lm.planning.slices import Slice

MARGIN = 1.25  # largest ratio of estimated memory to capacity that is still compiled
AXES = ("data", "fsdp", "tensor", "expert", "context", "pipe")
MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
# Smallest shard of a sequence: attention kernels process blocks of this length.
SHARD = 2048


class Candidate(NamedTuple):
    """A place and its plan, compiled or estimated."""

    place: Place
    plan: report.Plan

    @property
    def code(self) -> str:
        """The place as Python code, for an experiment file."""
        mesh = str(self.place.mesh).replace(",", ", ")
        numbers = {
            "microbatches": self.place.microbatches,
            "circular_repeats": self.place.circular_repeats,
        }
        rest = "".join(f", {name}={number}" for name, number in numbers.items() if number > 1)
        remat = self.place.remat
        remat = f'"{remat}"' if isinstance(remat, str) else remat
        return f"Place(mesh=Mesh({mesh}){rest}, remat={remat})"


def search(
    experiment: Experiment, on: str | None = None, *, compile: bool = True, count: int = 3
) -> list[Candidate]:
    """Searches the places that fit a slice; returns them fastest first.

    Compiles the best by estimate, until `count` of them fit or twice as many were tried. Also
    compiles the experiment's own place on this slice.

    Args:
        on: name of the slice (default: the experiment's first place on TPUs).
        compile: False ranks by estimate alone.

    Raises:
        UserError: nothing fits.
    """
    name = on or next((n for n in experiment.places if slices.NAME.fullmatch(n)), None)
    if name is None:
        raise UserError(f"{experiment.name} has no place on TPUs; name one, as in --on v5e-16.")
    tpu_slice = slices.find(name)
    own = experiment.places.get(name)
    declared = [own] if own is not None and own.mesh.size == tpu_slice.devices else []
    candidates: list[Candidate] = []
    for place in [*declared, *_ranked(experiment, tpu_slice)[: 2 * count]]:
        if sum(each.place not in declared for each in candidates) == count:
            break
        if place in [each.place for each in candidates]:
            continue
        try:
            plan = report.facts(experiment, name, place, tpu_slice, compile=compile)
        except UserError:
            continue  # not supported by the compiler
        if plan["fits"]:
            candidates.append(Candidate(place, plan))
    if not candidates:
        raise UserError(
            f"no mesh on {name} both divides {experiment.name} and fits into "
            f"{tpu_slice.chip.hbm / 1e9:.0f} GB per device; "
            "choose a larger slice or a smaller batch."
        )
    return sorted(candidates, key=lambda each: each.plan["step_seconds"])


def _ranked(e: Experiment, tpu_slice: Slice) -> list[Place]:
    """Places by estimated time, for each mesh and remat with the best number of micro-batches: of
    equal ones the smallest, since every micro-batch all-gathers the weights."""

    def rank(candidate: tuple[Place, Estimate]) -> tuple[float, ...]:
        place, estimated = candidate
        return estimated.seconds, estimated.links, place.microbatches

    best: dict[tuple[Mesh, str], Place] = {}
    for place, _ in sorted(_candidates(e, tpu_slice), key=rank):
        best.setdefault((place.mesh, place.remat), place)
    return list(best.values())


def _candidates(e: Experiment, tpu_slice: Slice) -> Iterator[tuple[Place, Estimate]]:
    """Places that divide the experiment and may fit."""
    limit = MARGIN * tpu_slice.chip.hbm
    meshes = list(_meshes(e, tpu_slice.devices))
    with terminal.progress("estimating meshes", len(meshes)) as bar:
        for mesh in meshes:
            for circular_repeats in (1, 2) if mesh.pipe > 1 else (1,):
                for place, estimated in _variants(e, tpu_slice, mesh, circular_repeats):
                    if estimated.peak <= limit:
                        yield place, estimated
            bar.advance()


def _variants(
    e: Experiment, tpu_slice: Slice, mesh: Mesh, circular_repeats: int
) -> Iterator[tuple[Place, Estimate]]:
    """All numbers of micro-batches and remat policies that a mesh allows."""
    state = None
    for microbatches, remat in itertools.product(MICROBATCHES, REMAT):
        try:
            place = Place(
                mesh=mesh, microbatches=microbatches, circular_repeats=circular_repeats, remat=remat
            )
            report.check(e, tpu_slice.name, place, tpu_slice)
        except UserError:
            continue
        if state is None:
            state = state_at(e, place)
        yield place, estimate(e, place, tpu_slice, state=state)


def _meshes(e: Experiment, devices: int) -> Iterator[Mesh]:
    """All meshes of this many devices over the axes that the model can use."""
    experts = max((getattr(b.ffn, "experts", 1) for b in e.model.layout.blocks), default=1)
    largest = {
        "tensor": 16,
        "expert": experts,
        "context": max(e.batch.length // SHARD, 1),
        "pipe": min(16, e.model.layout.repeats),
    }
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for sizes in itertools.product(
        *([n for n in divisors if n <= largest.get(a, devices)] for a in AXES[1:])
    ):
        if devices % math.prod(sizes) == 0:
            data = devices // math.prod(sizes)
            yield Mesh(data=data, **dict(zip(AXES[1:], sizes, strict=True)))


def text(candidates: list[Candidate]) -> str:
    """A table."""
    rows = [
        (
            each.code,
            terminal.duration(each.plan["step_seconds"]),
            f"{100 * each.plan['model_flops_utilization']:.1f} %",
            terminal.size(each.plan["peak_bytes_per_device"]),
        )
        for each in candidates
    ]
    return terminal.table(("place", "step", "MFU", "peak memory"), rows)
