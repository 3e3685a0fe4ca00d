"""A plan: the facts of one place, as a dictionary for machines and as text for people."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from lm import model, terminal
from lm.errors import UserError, nearest
from lm.experiment import Experiment
from lm.parallel.mesh import AXES, Mesh, Place
from lm.planning import compiled, compute, links, slices
from lm.planning.estimate import (
    ATTENTION,
    HBM,
    MATMUL,
    Estimate,
    attention_of,
    estimate,
    grouped_flops,
    in_attention,
)
from lm.planning.slices import Slice

LARGEST = 8  # arrays that are named


class Plan(dict):
    """The facts by name, as JSON has them; prints as text."""

    def __str__(self) -> str:
        return text(self)

    __repr__ = __str__


def choose(experiment: Experiment, on: str | None, mesh: Mesh | None) -> tuple[str, Place, Slice]:
    """The place called `on` (default: the first on TPUs) and its slice; any slice with a mesh of
    your own. Raises UserError where the two do not match."""
    places = experiment.places
    if on is None:
        on = next((name for name in places if slices.NAME.fullmatch(name)), None)
        if on is None:
            raise UserError(
                f"{experiment.name} has no place on TPUs; give one, as in "
                "--on v5e-16 --mesh fsdp=16."
            )
    where = slices.find(on)
    if on not in places and mesh is None:
        raise UserError(
            f"--on {on!r} is not a place of {experiment.name}; give it a mesh, as in "
            f"--mesh fsdp={where.devices}, or --search.{nearest(on, places)}"
        )
    place = places.get(on, Place(mesh=Mesh(), remat="block"))
    place = place if mesh is None else dataclasses.replace(place, mesh=mesh)
    check(experiment, on, place, where)
    return on, place, where


def check(experiment: Experiment, on: str, place: Place, where: Slice) -> None:
    """Raises UserError where a place can't be on a slice, or the batch not on the place."""
    if place.mesh.size != where.devices:
        per_chip = f", {where.chip.devices} to a chip" if where.chip.devices > 1 else ""
        raise UserError(
            f"mesh {place.mesh} has {place.mesh.size} devices and {on} ({where.topology}) has "
            f"{where.devices}{per_chip}; make the mesh's sizes multiply to {where.devices}."
        )
    experiment.check_place(place)


def plan(
    experiment: Experiment,
    on: str | None = None,
    *,
    mesh: Mesh | None = None,
    price: float | None = None,
    compile: bool = True,
) -> Plan:
    """The plan of an experiment at a place.

    Args:
        on: one of its places, or any slice together with a mesh.
        price: of a chip for an hour, in a currency of your choice.
        compile: False leaves out what needs libtpu, as happens where it is not installed.
    """
    name, place, where = choose(experiment, on, mesh)
    return facts(experiment, name, place, where, price=price, compile=compile)


def facts(
    experiment: Experiment,
    name: str,
    place: Place,
    where: Slice,
    *,
    price: float | None = None,
    compile: bool = True,
    attention: tuple[float, float] | None = None,
) -> Plan:
    """The plan of a place that has been checked; `attention` as in `estimate`."""
    e, chip = experiment, where.chip
    guess = estimate(e, place, where, attention=attention)
    schedule = e.schedule.resolve(e.batch)
    tokens = e.batch.sequences * e.batch.length
    told = Plan(
        experiment=e.name,
        place=name,
        slices=where.count,
        topology=where.topology,
        chips=where.chips,
        devices=where.devices,
        mesh=str(place.mesh),
        microbatches=place.microbatches,
        remat=place.remat,
        tokens_per_step=tokens,
        steps=schedule.steps,
        parameter_count=model.parameter_count(e.model).total,
        model_flops_per_step=model.train_flops(e.model, e.batch.length) * tokens,
        capacity_bytes_per_device=int(chip.hbm),
        parameter_bytes_per_device=guess.parameters,
        optimizer_bytes_per_device=guess.optimizer,
        gradient_bytes_per_device=guess.gradients,
        state_bytes_per_device=guess.state,
        pipeline_bubble=guess.bubble,
        estimate=_estimated(guess, int(chip.hbm)),
        compiled=compile and compiled.available(),
    )
    if told["compiled"]:
        told.update(_compiled(e, name, place, where, attention or ATTENTION[where.generation]))
    else:
        told.update(_uncompiled(guess, int(chip.hbm)))
    told.update(_course(told, chip.flops, e.batch.tokens_before(schedule.steps), price))
    return told


def _estimated(guess: Estimate, capacity: int) -> dict[str, Any]:
    return {
        "peak_bytes_per_device": guess.peak,
        "activation_bytes_per_device": guess.activations,
        "working_bytes_per_device": guess.working,
        "fits": guess.peak <= capacity,
        "compute_seconds": guess.compute,
        "link_seconds": guess.links,
        "exposed_link_seconds": guess.exposed,
        "step_seconds": guess.seconds,
        "assumptions": {"share_of_matmul_peak": MATMUL, "share_of_hbm_bandwidth": HBM},
    }


def _uncompiled(guess: Estimate, capacity: int) -> dict[str, Any]:
    """What stands in for the compiler's word without it."""
    return {
        "peak_bytes_per_device": guess.peak,
        "temp_bytes_per_device": guess.peak - guess.state,
        "fits": guess.peak <= capacity,
        "collectives": None,
        "compile_seconds": None,
        "step_seconds": guess.seconds,
    }


def _compiled(
    e: Experiment, name: str, place: Place, where: Slice, attention: tuple[float, float]
) -> dict[str, Any]:
    """The compiler's word, and a roofline over its program."""
    terminal.note(
        f"compiling {e.name} for {name}: mesh {place.mesh}, {place.microbatches} micro-batch(es), "
        f"remat {place.remat!r}; a minute or several ..."
    )
    result = compiled.step(e, name, place, where)
    chip = where.chip
    told: dict[str, Any] = {
        "fits": result.fits,
        "peak_bytes_per_device": result.peak,
        "argument_bytes_per_device": result.arguments,
        "temp_bytes_per_device": result.peak - result.arguments,
        "temp_slot_bytes_per_device": result.slots,
        "host_bytes_per_device": result.host,
        "largest_arrays": [live._asdict() for live in result.live[:LARGEST]],
        "activation_bytes_at_peak_per_device": _made_forward(result.live),
        "compile_seconds": result.seconds,
    }
    if result.program is None:
        return told | {"collectives": None, "step_seconds": None}
    rates = MATMUL * chip.flops / chip.devices, HBM * chip.hbm_bandwidth / chip.devices
    done = compute.work(result.program, *rates)
    across = place.mesh.across(where.count)
    layout = links.Layout(result.mesh.devices, AXES, where, across)
    rows = links.collectives(result.program, layout)
    on_links, hidden = sum(row.seconds for row in rows), sum(row.hidden for row in rows)
    in_kernels = _in_kernels(e, place, where, done.kernels, attention)
    on_chip = done.seconds + in_kernels.seconds
    return told | {
        "flops_per_device_per_step": done.flops + in_kernels.flops,
        "bytes_per_device_per_step": done.nbytes,
        "kernels": done.kernels,
        "compute_seconds": on_chip,
        "link_seconds": on_links,
        "collectives": [row._asdict() for row in rows],
        "step_seconds_overlapped": max(on_chip, on_links),
        "step_seconds_in_a_row": on_chip + on_links,
        # What the compiler starts early runs behind the work, the rest is waited for.
        "step_seconds": max(on_chip, hidden) + on_links - hidden,
    }


class _InKernels(NamedTuple):
    flops: float
    seconds: float


def _in_kernels(
    e: Experiment,
    place: Place,
    where: Slice,
    kernels: dict[str, int],
    shares: tuple[float, float],
) -> _InKernels:
    """Per device, of kernels whose work depends on what they are given.

    Attention: two products forward, as often as it runs, and five backward. Grouped products: those
    of a balanced load, since rows that are nobody's are not multiplied.
    """
    forward, backward, grouped = (
        sum(n for name, n in kernels.items() if part in name)
        for part in ("attention_forward", "attention_backward", "grouped_matmul")
    )
    tokens = e.batch.sequences * e.batch.length / place.mesh.size
    products = grouped * tokens * place.mesh.pipe / place.microbatches * grouped_flops(e)
    flops, at_peak = products, products / MATMUL
    if backward:
        each, head_dim = attention_of(e)
        flops += tokens * each * (forward / backward + 2.5)
        at_peak += in_attention(tokens * each, forward / backward, head_dim, shares)
    return _InKernels(flops, at_peak * where.chip.devices / where.chip.flops)


def _made_forward(live: Sequence[compiled.Live]) -> int:
    """Bytes alive at the fullest moment that the forward pass made."""
    return sum(x.nbytes for x in live if "jvp" in x.source and "transpose" not in x.source)


def _course(told: Plan, peak_flops: float, tokens: int, price: float | None) -> dict[str, Any]:
    """Speed, and the whole schedule."""
    step = told["step_seconds"]
    if not step:
        return {"model_flops_utilization": None, "tokens_per_second": None}
    seconds = step * told["steps"]
    hours = seconds * told["chips"] / 3600
    return {
        "tokens_per_second": told["tokens_per_step"] / step,
        "model_flops_utilization": told["model_flops_per_step"] / step / told["chips"] / peak_flops,
        "total_tokens": tokens,
        "total_seconds": seconds,
        "chip_hours": hours,
        "cost": None if price is None else price * hours,
    }


def text(told: Plan) -> str:
    """For a person."""
    size = terminal.size
    capacity, peak = told["capacity_bytes_per_device"], told["peak_bytes_per_device"]
    verdict = (
        f"fits, {size(capacity - peak)} to spare"
        if told["fits"]
        else f"does not fit by {size(peak - capacity)}"
    )
    several = f"{told['slices']} x " if told["slices"] > 1 else ""
    lines = [
        f"{told['experiment']} on {told['place']}: {told['chips']} chips "
        f"({several}{told['topology']}), "
        f"mesh {told['mesh']}, {told['microbatches']} micro-batch(es), remat {told['remat']!r}",
        "",
        f"Memory      {size(peak)} of {size(capacity)} per device: {verdict}",
        f"            parameters {size(told['parameter_bytes_per_device'])}, optimizer "
        f"{size(told['optimizer_bytes_per_device'])}, gradients "
        f"{size(told['gradient_bytes_per_device'])}, temporaries with these "
        f"{size(told['temp_bytes_per_device'])}",
    ]
    if not told["compiled"]:
        lines.append("            estimated: the step was not compiled")
        if not compiled.available():
            lines.append(
                "            (libtpu, which would, is not installed: "
                'pip install "jax[tpu]"; no TPU is needed)'
            )
    lines += _memory_lines(told) + _work_lines(told) + _link_lines(told) + _time_lines(told)
    return "\n".join(lines)


def _memory_lines(told: Plan) -> list[str]:
    if not told.get("largest_arrays"):
        return []
    rows = [
        (terminal.size(each["nbytes"]), each["shape"], each["source"][-70:])
        for each in told["largest_arrays"]
    ]
    head = ("at the fullest moment", "shape", "made by")
    return ["", terminal.indent(terminal.table(head, rows), 12), ""]


def _work_lines(told: Plan) -> list[str]:
    lines = [f"Model FLOPs {told['model_flops_per_step']:.4g} per step, from the declaration"]
    if told.get("flops_per_device_per_step"):
        lines.append(
            f"Compiled    {told['flops_per_device_per_step']:.4g} FLOPs of products and "
            f"{terminal.size(told['bytes_per_device_per_step'])} through memory per device and step"
        )
    if told.get("kernels"):
        counted = ", ".join(f"{name} x {n}" for name, n in told["kernels"].items())
        lines.append(f"Kernels     {counted}")
    return lines


def _link_lines(told: Plan) -> list[str]:
    if not told.get("collectives"):
        return []
    rows = [
        (
            row["kind"],
            row["axes"],
            row["dtype"],
            f"{row['count']:,}",
            terminal.size(row["nbytes"]),
            terminal.duration(row["seconds"]),
            f"{100 * row['hidden'] / row['seconds']:.0f} %" if row["seconds"] else "",
        )
        for row in told["collectives"]
    ]
    head = ("collective", "axes", "format", "a step", "bytes", "on the links", "started early")
    return ["", terminal.indent(terminal.table(head, rows), 12), ""]


def _time_lines(told: Plan) -> list[str]:
    lines = []
    if told["mesh"] and told["pipeline_bubble"]:
        lines.append(f"Bubble      {100 * told['pipeline_bubble']:.1f} % of a step")
    guess = told["estimate"]
    if told["compiled"] and told["step_seconds"]:
        lines.append(
            f"Roofline    {terminal.duration(told['compute_seconds'])} of work, "
            f"{terminal.duration(told['link_seconds'])} on the links; overlapped "
            f"{terminal.duration(told['step_seconds_overlapped'])}, in a row "
            f"{terminal.duration(told['step_seconds_in_a_row'])}"
        )
    lines.append(
        f"Estimate    {terminal.duration(guess['step_seconds'])} a step and "
        f"{terminal.size(guess['peak_bytes_per_device'])} per device, without the compiler"
    )
    if told["step_seconds"]:
        lines += [
            f"Step        {terminal.duration(told['step_seconds'])}, "
            f"{terminal.number(told['tokens_per_second'])} tokens/s, MFU "
            f"{100 * told['model_flops_utilization']:.1f} % "
            "(model FLOPs / step / chips / bf16 peak)",
            f"            assumes products at {100 * MATMUL:.0f} % of the peak, memory at "
            f"{100 * HBM:.0f} % of its bandwidth, collectives alone on their links",
            f"Schedule    {told['steps']:,} steps, {terminal.number(told['total_tokens'])} tokens: "
            f"{terminal.duration(told['total_seconds'])}, {told['chip_hours']:,.0f} chip-hours"
            + (f", cost {told['cost']:,.0f}" if told["cost"] is not None else ""),
        ]
    if told["compile_seconds"]:
        lines.append(f"Compiled in {terminal.duration(told['compile_seconds'])}")
    return lines
