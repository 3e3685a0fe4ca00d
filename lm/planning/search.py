"""Tries meshes, micro-batches and remat policies on a slice: all of them by estimate, the best few
by compiling."""

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

ROOM = 1.25  # an estimate of memory may be so far above capacity and still be tried
AXES = ("data", "fsdp", "tensor", "expert", "context", "pipe")
MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
# A shorter part of a sequence is less than attention's kernels take at once.
PART = 2048


class Found(NamedTuple):
    """A place and its plan, compiled or estimated."""

    place: Place
    plan: report.Plan

    @property
    def code(self) -> str:
        """To paste into an experiment."""
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
    experiment: Experiment, on: str | None = None, *, compile: bool = True, few: int = 3
) -> list[Found]:
    """The places that fit, the fastest first: of the best by estimate, one after another is
    compiled until `few` have been found to fit (or twice as many have been tried). The experiment's
    own place on that slice, where it has one, is compiled too. Raises UserError where nothing fits.
    """
    name = on or next((n for n in experiment.places if slices.NAME.fullmatch(n)), None)
    if name is None:
        raise UserError(f"{experiment.name} has no place on TPUs; give one, as in --on v5e-16.")
    where = slices.find(name)
    own = experiment.places.get(name)
    given = [own] if own is not None and own.mesh.size == where.devices else []
    found: list[Found] = []
    for place in [*given, *_ranked(experiment, where)[: 2 * few]]:
        if sum(each.place not in given for each in found) == few:
            break
        if place in [each.place for each in found]:
            continue
        try:
            told = report.facts(experiment, name, place, where, compile=compile)
        except UserError:
            continue  # more than the compiler can do
        if told["fits"]:
            found.append(Found(place, told))
    if not found:
        raise UserError(
            f"no mesh of {name} both divides {experiment.name} and fits its memory of "
            f"{where.chip.hbm / 1e9:.0f} GB per device; take a larger slice or a smaller batch."
        )
    return sorted(found, key=lambda each: each.plan["step_seconds"])


def _ranked(e: Experiment, where: Slice) -> list[Place]:
    """The fastest first, by estimate; of each mesh and remat the best number of micro-batches: of
    those that come out equal the smallest, since each gathers the weights anew."""

    def rank(candidate: tuple[Place, Estimate]) -> tuple[float, ...]:
        place, guess = candidate
        return guess.seconds, guess.links, place.microbatches

    best: dict[tuple[Mesh, str], Place] = {}
    for place, _ in sorted(_candidates(e, where), key=rank):
        best.setdefault((place.mesh, place.remat), place)
    return list(best.values())


def _candidates(e: Experiment, where: Slice) -> Iterator[tuple[Place, Estimate]]:
    """Places that divide the experiment and come near to fitting."""
    most = ROOM * where.chip.hbm
    meshes = list(_meshes(e, where.devices))
    with terminal.progress("estimating meshes", len(meshes)) as bar:
        for mesh in meshes:
            for circular_repeats in (1, 2) if mesh.pipe > 1 else (1,):
                for place, guess in _spendings(e, where, mesh, circular_repeats):
                    if guess.peak <= most:
                        yield place, guess
            bar.advance()


def _spendings(
    e: Experiment, where: Slice, mesh: Mesh, circular_repeats: int
) -> Iterator[tuple[Place, Estimate]]:
    """All micro-batches and remat policies that a mesh allows."""
    state = None
    for microbatches, remat in itertools.product(MICROBATCHES, REMAT):
        try:
            place = Place(
                mesh=mesh, microbatches=microbatches, circular_repeats=circular_repeats, remat=remat
            )
            report.check(e, where.name, place, where)
        except UserError:
            continue
        if state is None:
            state = state_at(e, place)
        yield place, estimate(e, place, where, state=state)


def _meshes(e: Experiment, devices: int) -> Iterator[Mesh]:
    """Every way to share out the devices over the axes that this model has a use for."""
    experts = max((getattr(b.ffn, "experts", 1) for b in e.model.layout.blocks), default=1)
    most = {
        "tensor": 16,
        "expert": experts,
        "context": max(e.batch.length // PART, 1),
        "pipe": min(16, e.model.layout.repeats),
    }
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for sizes in itertools.product(
        *([n for n in divisors if n <= most.get(a, devices)] for a in AXES[1:])
    ):
        if devices % math.prod(sizes) == 0:
            rest = devices // math.prod(sizes)
            yield Mesh(data=rest, **dict(zip(AXES[1:], sizes, strict=True)))


def text(found: list[Found]) -> str:
    """For a person."""
    rows = [
        (
            each.code,
            terminal.duration(each.plan["step_seconds"]),
            f"{100 * each.plan['model_flops_utilization']:.1f} %",
            terminal.size(each.plan["peak_bytes_per_device"]),
        )
        for each in found
    ]
    return terminal.table(("place", "step", "MFU", "peak memory"), rows)
