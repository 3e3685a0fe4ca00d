"""Plan: the facts about one place, as a dictionary and as text."""

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
    attention_flops_at_peak,
    attention_of,
    estimate,
    grouped_flops,
)
from lm.planning.slices import Slice

LARGEST = 8  # number of arrays that a plan lists


class Plan(dict):
    """{name: fact}, serializable as JSON; prints as text."""

    def __str__(self) -> str:
        return text(self)

    __repr__ = __str__


def choose(experiment: Experiment, on: str | None, mesh: Mesh | None) -> tuple[str, Place, Slice]:
    """(name, place, slice) to plan for.

    Args:
        on: name of a place (default: the first on TPUs), or of any slice if `mesh` is given.
        mesh: replaces the mesh of the place.

    Raises:
        UserError: mesh and slice do not match, or there is no such slice.
    """
    places = experiment.places
    on = first_slice(experiment) if on is None else on
    tpu_slice = slices.find(on)
    if on not in places and mesh is None:
        raise UserError(
            f"--on {on!r} is not a place of {experiment.name}; add a mesh, as in "
            f"--mesh fsdp={tpu_slice.devices}, or --search.{nearest(on, places)}"
        )
    place = places.get(on, Place(mesh=Mesh(), remat="block"))
    place = place if mesh is None else dataclasses.replace(place, mesh=mesh)
    check(experiment, on, place, tpu_slice)
    return on, place, tpu_slice


def first_slice(experiment: Experiment) -> str:
    """Name of the first place on TPUs. Raises UserError if there is none."""
    for name in experiment.places:
        if slices.NAME.fullmatch(name):
            return name
    raise UserError(
        f"{experiment.name} has no place on TPUs; name a slice and a mesh, as in "
        "--on v5e-16 --mesh fsdp=16."
    )


def check(experiment: Experiment, on: str, place: Place, tpu_slice: Slice) -> None:
    """Raises UserError if the mesh does not match the slice, or batch or model do not divide over
    the mesh."""
    check_mesh(on, place.mesh, tpu_slice)
    experiment.check_place(place)


def check_mesh(on: str, mesh: Mesh, tpu_slice: Slice) -> None:
    """Raises UserError if the slice has another number of devices than the mesh."""
    if mesh.size != tpu_slice.devices:
        needed, per_chip = tpu_slice.devices, tpu_slice.chip.devices
        cores = f", {per_chip} per chip" if per_chip > 1 else ""
        raise UserError(
            f"mesh {mesh} has {mesh.size} devices and {on} ({tpu_slice.topology}) has "
            f"{needed}{cores}; choose mesh sizes whose product is {needed}."
        )


def plan(
    experiment: Experiment,
    on: str | None = None,
    *,
    mesh: Mesh | None = None,
    price: float | None = None,
    compile: bool = True,
) -> Plan:
    """Plans an experiment at a place.

    Args:
        on: name of a place (default: the first on TPUs), or of any slice if `mesh` is given.
        mesh: replaces the mesh of the place.
        price: price of a chip-hour, in any currency.
        compile: False estimates without libtpu, as happens where it is not installed.

    Raises:
        UserError: mesh, slice and batch do not match, or the compiler does not support the mesh.
    """
    name, place, tpu_slice = choose(experiment, on, mesh)
    return facts(experiment, name, place, tpu_slice, price=price, compile=compile)


def facts(
    experiment: Experiment,
    name: str,
    place: Place,
    tpu_slice: Slice,
    *,
    price: float | None = None,
    compile: bool = True,
    attention: tuple[float, float] | None = None,
) -> Plan:
    """Plans a checked place; `attention` as in `estimate`."""
    e, chip = experiment, tpu_slice.chip
    estimated = estimate(e, place, tpu_slice, attention=attention)
    schedule = e.schedule.resolve(e.batch)
    tokens = e.batch.sequences * e.batch.length
    result = Plan(
        experiment=e.name,
        place=name,
        slices=tpu_slice.count,
        topology=tpu_slice.topology,
        chips=tpu_slice.chips,
        devices=tpu_slice.devices,
        mesh=str(place.mesh),
        microbatches=place.microbatches,
        remat=place.remat,
        tokens_per_step=tokens,
        steps=schedule.steps,
        parameter_count=model.parameter_count(e.model).total,
        model_flops_per_step=model.train_flops(e.model, e.batch.length) * tokens,
        capacity_bytes_per_device=int(chip.hbm),
        parameter_bytes_per_device=estimated.parameters,
        optimizer_bytes_per_device=estimated.optimizer,
        gradient_bytes_per_device=estimated.gradients,
        state_bytes_per_device=estimated.state,
        pipeline_bubble=estimated.bubble,
        estimate=_estimated(estimated, int(chip.hbm)),
        compiled=compile and compiled.available(),
    )
    if result["compiled"]:
        fractions = attention or ATTENTION[tpu_slice.generation]
        result.update(_compiled(e, name, place, tpu_slice, fractions))
    else:
        result.update(_uncompiled(estimated, int(chip.hbm)))
    result.update(_schedule(result, chip.flops, e.batch.tokens_before(schedule.steps), price))
    return result


def _estimated(estimated: Estimate, capacity: int) -> dict[str, Any]:
    return {
        "peak_bytes_per_device": estimated.peak,
        "activation_bytes_per_device": estimated.activations,
        "working_bytes_per_device": estimated.working,
        "fits": estimated.peak <= capacity,
        "compute_seconds": estimated.compute,
        "link_seconds": estimated.links,
        "exposed_link_seconds": estimated.exposed,
        "step_seconds": estimated.seconds,
        "assumptions": {"share_of_matmul_peak": MATMUL, "share_of_hbm_bandwidth": HBM},
    }


def _uncompiled(estimated: Estimate, capacity: int) -> dict[str, Any]:
    """The estimate in place of facts from the compiler."""
    return {
        "peak_bytes_per_device": estimated.peak,
        "temp_bytes_per_device": estimated.peak - estimated.state,
        "fits": estimated.peak <= capacity,
        "collectives": None,
        "compile_seconds": None,
        "step_seconds": estimated.seconds,
    }


def _compiled(
    e: Experiment, name: str, place: Place, tpu_slice: Slice, attention: tuple[float, float]
) -> dict[str, Any]:
    """Facts from the compiler, and a roofline of the compiled program."""
    terminal.note(
        f"compiling {e.name} for {name}: mesh {place.mesh}, {place.microbatches} micro-batch(es), "
        f"remat {place.remat!r}; takes one to several minutes ..."
    )
    result = compiled.step(e, name, place, tpu_slice)
    chip = tpu_slice.chip
    memory: dict[str, Any] = {
        "fits": result.fits,
        "peak_bytes_per_device": result.peak,
        "argument_bytes_per_device": result.arguments,
        "temp_bytes_per_device": result.peak - result.arguments,
        "temp_slot_bytes_per_device": result.slots,
        "host_bytes_per_device": result.host,
        "largest_arrays": [live._asdict() for live in result.live[:LARGEST]],
        "activation_bytes_at_peak_per_device": _activation_bytes(result.live),
        "compile_seconds": result.seconds,
    }
    if result.program is None:
        return memory | {"collectives": None, "step_seconds": None}
    rates = MATMUL * chip.flops / chip.devices, HBM * chip.hbm_bandwidth / chip.devices
    work = compute.work(result.program, *rates)
    across = place.mesh.across(tpu_slice.count)
    layout = links.Layout(result.mesh.devices, AXES, tpu_slice, across)
    rows = links.collectives(result.program, layout)
    on_links, hidden = sum(row.seconds for row in rows), sum(row.hidden for row in rows)
    kernels = _kernel_work(e, place, tpu_slice, work.kernels, attention)
    on_chip = work.seconds + kernels.seconds
    return memory | {
        "flops_per_device_per_step": work.flops + kernels.flops,
        "bytes_per_device_per_step": work.nbytes,
        "kernels": work.kernels,
        "compute_seconds": on_chip,
        "link_seconds": on_links,
        "collectives": [row._asdict() for row in rows],
        "step_seconds_overlapped": max(on_chip, on_links),
        "step_seconds_in_a_row": on_chip + on_links,
        # Asynchronous collectives overlap with computation, the others do not.
        "step_seconds": max(on_chip, hidden) + on_links - hidden,
    }


class _KernelWork(NamedTuple):
    flops: float
    seconds: float


def _kernel_work(
    e: Experiment,
    place: Place,
    tpu_slice: Slice,
    kernels: dict[str, int],
    fractions: tuple[float, float],
) -> _KernelWork:
    """Work per device of attention and grouped matmul kernels, which the program's text omits.

    Attention: two matmuls in each forward call, five in the backward call. Grouped matmuls: the
    FLOPs of a balanced load, because the kernel skips padding rows.
    """
    forward, backward, grouped = (
        sum(n for name, n in kernels.items() if part in name)
        for part in ("attention_forward", "attention_backward", "grouped_matmul")
    )
    tokens = e.batch.sequences * e.batch.length / place.mesh.size
    matmuls = grouped * tokens * place.mesh.pipe / place.microbatches * grouped_flops(e)
    flops, at_peak = matmuls, matmuls / MATMUL
    if backward:
        each, head_dim = attention_of(e)
        flops += tokens * each * (forward / backward + 2.5)
        at_peak += attention_flops_at_peak(tokens * each, forward / backward, head_dim, fractions)
    return _KernelWork(flops, at_peak * tpu_slice.chip.devices / tpu_slice.chip.flops)


def _activation_bytes(live: Sequence[compiled.Live]) -> int:
    """Bytes at the time of peak usage that the forward pass produced."""
    return sum(x.nbytes for x in live if "jvp" in x.source and "transpose" not in x.source)


def _schedule(plan: Plan, peak_flops: float, tokens: int, price: float | None) -> dict[str, Any]:
    """Throughput, and time and cost of the whole schedule."""
    step = plan["step_seconds"]
    if not step:
        return {"model_flops_utilization": None, "tokens_per_second": None}
    seconds = step * plan["steps"]
    hours = seconds * plan["chips"] / 3600
    return {
        "tokens_per_second": plan["tokens_per_step"] / step,
        "model_flops_utilization": plan["model_flops_per_step"] / step / plan["chips"] / peak_flops,
        "total_tokens": tokens,
        "total_seconds": seconds,
        "chip_hours": hours,
        "cost": None if price is None else price * hours,
    }


def text(plan: Plan) -> str:
    """The plan as text."""
    size = terminal.size
    capacity, peak = plan["capacity_bytes_per_device"], plan["peak_bytes_per_device"]
    verdict = (
        f"fits, {size(capacity - peak)} to spare"
        if plan["fits"]
        else f"does not fit by {size(peak - capacity)}"
    )
    several = f"{plan['slices']} x " if plan["slices"] > 1 else ""
    lines = [
        f"{plan['experiment']} on {plan['place']}: {plan['chips']} chips "
        f"({several}{plan['topology']}), "
        f"mesh {plan['mesh']}, {plan['microbatches']} micro-batch(es), remat {plan['remat']!r}",
        "",
        f"Memory      {size(peak)} of {size(capacity)} per device: {verdict}",
        f"            parameters {size(plan['parameter_bytes_per_device'])}, optimizer "
        f"{size(plan['optimizer_bytes_per_device'])}, gradients "
        f"{size(plan['gradient_bytes_per_device'])}, temporaries including gradients "
        f"{size(plan['temp_bytes_per_device'])}",
    ]
    if not plan["compiled"]:
        lines.append("            estimated: the step was not compiled")
        if not compiled.available():
            lines.append(
                '            (compiling needs libtpu: pip install "jax[tpu]"; it needs no TPU)'
            )
    lines += _memory_lines(plan) + _work_lines(plan) + _link_lines(plan) + _time_lines(plan)
    return "\n".join(lines)


def _memory_lines(plan: Plan) -> list[str]:
    if not plan.get("largest_arrays"):
        return []
    rows = [
        (terminal.size(each["nbytes"]), each["shape"], each["source"][-70:])
        for each in plan["largest_arrays"]
    ]
    header = ("at peak usage", "shape", "produced by")
    return ["", terminal.indent(terminal.table(header, rows), 12), ""]


def _work_lines(plan: Plan) -> list[str]:
    lines = [f"Model FLOPs {plan['model_flops_per_step']:.4g} per step, from the declaration"]
    if plan.get("flops_per_device_per_step"):
        lines.append(
            f"Compiled    {plan['flops_per_device_per_step']:.4g} FLOPs of matmuls and "
            f"{terminal.size(plan['bytes_per_device_per_step'])} of memory traffic per device and "
            "step"
        )
    if plan.get("kernels"):
        calls = ", ".join(f"{name} x {n}" for name, n in plan["kernels"].items())
        lines.append(f"Kernels     {calls}")
    return lines


def _link_lines(plan: Plan) -> list[str]:
    if not plan.get("collectives"):
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
        for row in plan["collectives"]
    ]
    header = ("collective", "axes", "dtype", "per step", "bytes", "on links", "asynchronous")
    return ["", terminal.indent(terminal.table(header, rows), 12), ""]


def _time_lines(plan: Plan) -> list[str]:
    lines = []
    if plan["mesh"] and plan["pipeline_bubble"]:
        lines.append(f"Bubble      {100 * plan['pipeline_bubble']:.1f} % of a step")
    estimated = plan["estimate"]
    if plan["compiled"] and plan["step_seconds"]:
        lines.append(
            f"Roofline    {terminal.duration(plan['compute_seconds'])} of computation, "
            f"{terminal.duration(plan['link_seconds'])} of communication; with full overlap "
            f"{terminal.duration(plan['step_seconds_overlapped'])}, without "
            f"{terminal.duration(plan['step_seconds_in_a_row'])}"
        )
    lines.append(
        f"Estimate    {terminal.duration(estimated['step_seconds'])} per step and "
        f"{terminal.size(estimated['peak_bytes_per_device'])} per device, without the compiler"
    )
    if plan["step_seconds"]:
        lines += [
            f"Step        {terminal.duration(plan['step_seconds'])}, "
            f"{terminal.number(plan['tokens_per_second'])} tokens/s, MFU "
            f"{100 * plan['model_flops_utilization']:.1f} % "
            "(model FLOPs / step / chips / bf16 peak)",
            f"            assumes matmuls at {100 * MATMUL:.0f} % of the peak, memory traffic at "
            f"{100 * HBM:.0f} % of the bandwidth, no contention between collectives",
            f"Schedule    {plan['steps']:,} steps, {terminal.number(plan['total_tokens'])} tokens: "
            f"{terminal.duration(plan['total_seconds'])}, {plan['chip_hours']:,.0f} chip-hours"
            + (f", cost {plan['cost']:,.0f}" if plan["cost"] is not None else ""),
        ]
    if plan["compile_seconds"]:
        lines.append(f"Compiled in {terminal.duration(plan['compile_seconds'])}")
    return lines
