"""Weak scaling: the same work per chip on slices of growing size."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from lm import terminal
from lm.errors import UserError
from lm.experiment import Experiment
from lm.parallel.mesh import Mesh
from lm.planning import report, slices

FSDP = 256  # ways; beyond, `data` grows: no device's part of a weight should become too thin


class Row(NamedTuple):
    """A slice, and how much of the first one's speed per chip it keeps."""

    plan: report.Plan
    efficiency: float


def scaling(
    experiment: Experiment, on: Sequence[str], mesh: Mesh | None = None, *, compile: bool = True
) -> list[Row]:
    """One row for each slice.

    The first has the experiment's batch and its place there, or `mesh`; the others have as many
    times the sequences as they have devices, and the mesh grows along `fsdp` up to FSDP ways, then
    along `data`.
    """
    name, place, first = report.choose(experiment, on[0], mesh)
    rows: list[Row] = []
    for name in on:
        where = slices.find(name)
        times, rest = divmod(where.devices, first.devices)
        if rest:
            raise UserError(
                f"--weak {name!r} has {where.devices} devices, which is no multiple of the "
                f"{first.devices} of {on[0]!r}; take one that is."
            )
        wider = next(n for n in range(times, 0, -1) if times % n == 0 and _fits(place.mesh, n))
        grown = dataclasses.replace(
            place.mesh, fsdp=place.mesh.fsdp * wider, data=place.mesh.data * times // wider
        )
        sequences = experiment.batch.sequences * times
        e = dataclasses.replace(
            experiment, batch=dataclasses.replace(experiment.batch, sequences=sequences)
        )
        there = dataclasses.replace(place, mesh=grown)
        report.check(e, name, there, where)
        told = report.facts(e, name, there, where, compile=compile)
        utilization = told["model_flops_utilization"] or 0.0
        base = rows[0].plan["model_flops_utilization"] if rows else utilization
        rows.append(Row(told, utilization / base if base else 0.0))
    return rows


def _fits(mesh: Mesh, times: int) -> bool:
    return times == 1 or mesh.fsdp * times <= FSDP


def text(rows: Sequence[Row]) -> str:
    """For a person. Links bind where their share comes near the whole step."""
    shown = []
    for told, efficiency in rows:
        seconds = told if told["compiled"] else told["estimate"]
        links = seconds.get("link_seconds")
        step = told["step_seconds"]
        shown.append(
            (
                f"{told['chips']:,}",
                told["mesh"],
                terminal.duration(step) if step else "does not fit",
                terminal.duration(links) if links else "",
                f"{100 * links / step:.0f} %" if links and step else "",
                f"{100 * efficiency:.1f} %",
                "compiled" if told["compiled"] else "estimated",
            )
        )
    head = ("chips", "mesh", "step", "on the links", "of the step", "efficiency", "by")
    return terminal.table(head, shown)
