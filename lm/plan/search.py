"""Tries meshes, micro-batches and remat policies on a slice: all of them by estimate, the best few
by compiling."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from lm import terminal
from lm.errors import Refused
from lm.experiment import Experiment
from lm.mesh import Mesh, Place
from lm.plan import report, slices
from lm.plan.estimate import estimate
from lm.plan.slices import Slice

ROOM = 1.25  # an estimate of memory may be so far above capacity and still be tried
AXES = ("data", "fsdp", "tensor", "expert", "context")


class Found(NamedTuple):
    """A place and its plan, compiled or estimated."""

    place: Place
    plan: report.Plan

    @property
    def code(self) -> str:
        """To paste into an experiment."""
        mesh = str(self.place.mesh).replace(",", ", ")
        rest = f", microbatches={self.place.microbatches}" if self.place.microbatches > 1 else ""
        return f'Place(mesh=Mesh({mesh}){rest}, remat="{self.place.remat}")'


def search(
    experiment: Experiment, on: str | None = None, *, compile: bool = True, few: int = 3
) -> list[Found]:
    """The places that fit, the fastest first. The experiment's own place on that slice, where it
    has one, is among those that are compiled."""
    name = on or next((n for n in experiment.places if slices.NAME.fullmatch(n)), None)
    if name is None:
        raise Refused(f"{experiment.name} has no place on TPUs; give one, as in --on v5e-16.")
    where = slices.find(name)
    tried = sorted(
        ((guess.seconds, place) for place, guess in _candidates(experiment, where)),
        key=lambda pair: (pair[0], str(pair[1])),
    )
    if not tried:
        raise Refused(
            f"no mesh of {name} divides {experiment.name} and comes near its memory of "
            f"{where.chip.hbm / 1e9:.0f} GB per device; take a larger slice or a smaller batch."
        )
    chosen = [place for _, place in tried[:few]]
    own = experiment.places.get(name)
    if own is not None and own not in chosen and own.mesh.size == where.devices:
        chosen.append(own)
    found = [
        Found(place, report.facts(experiment, name, place, where, compile=compile))
        for place in chosen
    ]
    fitting = [each for each in found if each.plan["fits"]]
    return sorted(fitting, key=lambda each: each.plan["step_seconds"])


def _candidates(e: Experiment, where: Slice) -> Iterator[tuple[Place, object]]:
    for mesh in _meshes(e, where.devices):
        most = max(e.batch.sequences // mesh.batch_size, 1)
        for microbatches, remat in itertools.product((1, 2, 4, 8), ("none", "dots", "block")):
            if microbatches > most:
                continue
            place = Place(mesh=mesh, microbatches=microbatches, remat=remat)
            try:
                report.check(e, where.name, place, where)
            except Refused:
                continue
            guess = estimate(e, place, where)
            if guess.peak <= ROOM * where.chip.hbm:
                yield place, guess


def _meshes(e: Experiment, devices: int) -> Iterator[Mesh]:
    """Every way to share out the devices over the axes that this model has a use for."""
    experts = max((getattr(b.ffn, "experts", 1) for b in e.model.layout.blocks), default=1)
    most = {"tensor": 16, "expert": experts, "context": 1}
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
