"""Weak scaling: constant work per chip on slices of growing size."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from lm import terminal
from lm.errors import UserError
from lm.experiment import Experiment
from lm.parallel.mesh import Mesh
from lm.planning import report, slices

FSDP = 256  # largest fsdp axis: beyond it shards of a weight become too small, and `data` grows


class Row(NamedTuple):
    """Plan of a slice. `efficiency` is its throughput per chip relative to the first slice."""

    plan: report.Plan
    efficiency: float


def scaling(
    experiment: Experiment, on: Sequence[str], mesh: Mesh | None = None, *, compile: bool = True
) -> list[Row]:
    """Plans the experiment on each slice of `on`.

    The first has the experiment's batch, and its place of this name or `mesh`. On the others the
    number of sequences grows with the number of devices, and the mesh grows along `fsdp` up to
    FSDP, then along `data`.

    Raises:
      UserError: a slice does not exist, or its devices are no multiple of the first one's.
    """
    name, place, first = report.choose(experiment, on[0], mesh)
    rows: list[Row] = []
    for name in on:
        tpu_slice = slices.find(name)
        times, remainder = divmod(tpu_slice.devices, first.devices)
        if remainder:
            raise UserError(
                f"--weak {name!r} has {tpu_slice.devices} devices, which is not a multiple of the "
                f"{first.devices} of {on[0]!r}; choose a slice that is."
            )
        fsdp_times = next(n for n in range(times, 0, -1) if times % n == 0 and _fits(place.mesh, n))
        grown = dataclasses.replace(
            place.mesh,
            fsdp=place.mesh.fsdp * fsdp_times,
            data=place.mesh.data * times // fsdp_times,
        )
        sequences = experiment.batch.sequences * times
        e = dataclasses.replace(
            experiment, batch=dataclasses.replace(experiment.batch, sequences=sequences)
        )
        grown_place = dataclasses.replace(place, mesh=grown)
        report.check(e, name, grown_place, tpu_slice)
        plan = report.facts(e, name, grown_place, tpu_slice, compile=compile)
        utilization = plan["model_flops_utilization"] or 0.0
        base = rows[0].plan["model_flops_utilization"] if rows else utilization
        rows.append(Row(plan, utilization / base if base else 0.0))
    return rows


def _fits(mesh: Mesh, times: int) -> bool:
    return times == 1 or mesh.fsdp * times <= FSDP


def text(rows: Sequence[Row]) -> str:
    """A table. Communication is the bottleneck where its share approaches the whole step."""
    cells = []
    for plan, efficiency in rows:
        seconds = plan if plan["compiled"] else plan["estimate"]
        links = seconds.get("link_seconds")
        step = plan["step_seconds"]
        cells.append(
            (
                f"{plan['chips']:,}",
                plan["mesh"],
                terminal.duration(step) if step else "does not fit",
                terminal.duration(links) if links else "",
                f"{100 * links / step:.0f} %" if links and step else "",
                f"{100 * efficiency:.1f} %",
                "compiled" if plan["compiled"] else "estimated",
            )
        )
    header = ("chips", "mesh", "step", "links", "of the step", "efficiency", "by")
    return terminal.table(header, cells)
