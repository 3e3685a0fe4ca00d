"""Plans the generation engine on a TPU slice: memory of weights and cache, and the time of a step
with several numbers of requests.

The engine's program of R rows computes R tokens; a request that generates has one row in a step. A
step reads all weights of a device and the cached keys and values of each row. With tensor
parallelism every layer adds its results over the devices.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from lm import model, terminal
from lm.errors import UserError, check_name, check_size
from lm.experiment import Experiment
from lm.generate import programs
from lm.parallel.mesh import AXES, Mesh
from lm.planning import compiled, compute, links, report, slices
from lm.planning.engine import Engine
from lm.planning.estimate import HBM, MATMUL
from lm.planning.report import Plan
from lm.planning.slices import Slice

ROWS = (8, 64, 256)
CACHE_DTYPES = ("float32", "bfloat16", "int8")
# Kernels that access only the pages of a step's rows.
SPARSE = ("paged_attention", "write_pages")
WRITTEN = 32  # bytes of neighbouring slots that a new token's write reads and writes per element
RESERVE = 0.01  # of the memory, for gaps between arrays


class Program(NamedTuple):
    """Work of a program outside the paged kernels, per device.

    flops, nbytes  of matmuls; memory traffic
    seconds        of both
    links, hidden  seconds of collectives, and the part of it that can overlap
    temporaries    bytes
    collectives    as in `report`; None if estimated
    """

    flops: float
    nbytes: float
    seconds: float
    links: float
    hidden: float
    temporaries: int
    compile_seconds: float | None = None
    collectives: list[links.Collective] | None = None


def plan(
    experiment: Experiment,
    on: str | None = None,
    *,
    mesh: Mesh | None = None,
    context: int | None = None,
    rows: Sequence[int] = ROWS,
    cache_dtype: str | None = None,
    compile: bool = True,
) -> Plan:
    """Plans the engine with an experiment's model.

    Args:
        on: a slice such as v5p-8 (default: the experiment's first place on TPUs).
        mesh: default: tensor parallelism over all devices.
        context: tokens of each sequence (default: batch.length).
        rows: numbers of requests.
        cache_dtype: "bfloat16", "float32" or "int8" (default: the dtype of arithmetic).
        compile: False estimates without libtpu, as happens where it is not installed.

    Raises:
        UserError: the model does not divide over the mesh, or there is no such slice.
    """
    tpu_slice = slices.find(on or report.first_slice(experiment))
    mesh = mesh or Mesh(tensor=tpu_slice.devices)
    report.check_mesh(tpu_slice.name, mesh, tpu_slice)
    context = context or experiment.batch.length
    if cache_dtype is not None:
        check_name("cache_dtype", cache_dtype, CACHE_DTYPES)
    check_size(context=context, **{f"rows[{i}]": size for i, size in enumerate(rows)})
    ways = mesh.batch_size
    rows = sorted({-(-size // ways) * ways for size in rows})
    is_compiled = compile and compiled.available()
    devices = compiled.describe(tpu_slice) if is_compiled else None
    of_mesh = mesh.build(devices) if is_compiled else mesh.abstract()
    compute_dtype = experiment.precision.compute
    engine = Engine.of(experiment.model, compute_dtype, of_mesh, context, cache_dtype)
    return _facts(experiment, engine, mesh, tpu_slice, rows, is_compiled)


def _facts(
    e: Experiment, engine: Engine, mesh: Mesh, tpu_slice: Slice, rows: list[int], compile: bool
) -> Plan:
    chip, weights = tpu_slice.chip, compiled.nbytes(engine.model.params)
    by_estimate = {n: estimated(e, engine, mesh, tpu_slice, n) for n in rows}
    temporaries = max(each.temporaries for each in by_estimate.values())
    space = (1 - RESERVE) * chip.hbm - weights
    tokens = engine.fitting(space - temporaries, rows[-1])
    of_rows = by_estimate
    if compile and tokens:
        # Temporaries do not depend on the size of the cache; half of it fits in any case.
        half = max(tokens // 2, engine.context)
        caches = engine.caches(engine.counts(half, rows[-1]))
        of_rows = {n: compile_program(engine, caches, mesh, tpu_slice, n) for n in rows}
        temporaries = max(each.temporaries for each in of_rows.values())
        tokens = engine.fitting(space - temporaries, rows[-1])
    step = partial(_step, e, engine, mesh, tpu_slice)
    decode = [step(of_rows[n], n, engine.context) for n in rows] if tokens else []
    for each in decode:
        each["fits"] = each["rows"] * engine.context <= tokens
    prefill = step(of_rows[rows[-1]], rows[-1], engine.context // 2) if tokens else None
    return Plan(
        experiment=e.name,
        slice=tpu_slice.name,
        topology=tpu_slice.topology,
        chips=tpu_slice.chips,
        devices=tpu_slice.devices,
        mesh=str(mesh),
        context=engine.context,
        page=engine.page,
        weights_dtype=e.precision.compute,
        cache_dtype=engine.dtype,
        compiled=compile,
        capacity_bytes_per_device=int(chip.hbm),
        weight_bytes_per_device=weights,
        temp_bytes_per_device=temporaries,
        cache_bytes_per_device=int(space) - temporaries,
        cache_bytes_per_token_and_device=sum(engine.page_bytes().values()) / engine.page,
        cache_tokens=tokens,
        fits=tokens > 0,
        decode=decode,
        prefill=prefill,
    )


def compile_program(
    engine: Engine, caches: Any, mesh: Mesh, tpu_slice: Slice, rows: int
) -> Program:
    """Compiles the program of `rows` rows."""
    arguments = engine.arguments(rows, caches)
    of_mesh = engine.model.mesh
    result = compiled.build(
        partial(programs.forward.lower, *arguments),
        arguments,
        of_mesh,
        f"mesh {mesh} on {tpu_slice.topology}",
    )
    if result.program is None:
        raise UserError(
            f"the program of {rows} rows needs {result.peak:,} bytes per device; choose a smaller "
            "--rows, or a larger slice with --on."
        )
    work = compute.work(result.program, *_rates(tpu_slice), SPARSE)
    layout = links.Layout(of_mesh.devices, AXES, tpu_slice, mesh.across(tpu_slice.count))
    collectives = links.collectives(result.program, layout)
    return Program(
        work.flops,
        work.nbytes,
        work.seconds,
        sum(each.seconds for each in collectives),
        sum(each.hidden for each in collectives),
        result.peak - result.arguments,
        result.seconds,
        collectives,
    )


def estimated(e: Experiment, engine: Engine, mesh: Mesh, tpu_slice: Slice, rows: int) -> Program:
    """The same without the compiler: reads every weight once, except for the embedding; adds two
    results per layer over the tensor axis, and gathers the logits twice."""
    config, of_rows = e.model, rows / mesh.batch_size
    item = jnp.dtype(e.precision.compute).itemsize
    table = 0 if config.tied else config.vocab * config.dim * item / mesh.tensor
    nbytes = compiled.nbytes(engine.model.params) - table
    flops = model.flops(config, 0) * of_rows / mesh.tensor
    flops_rate, bytes_rate = _rates(tpu_slice)
    sides = [(mesh.tensor, False)] if mesh.tensor > 1 else []
    if mesh.tensor == tpu_slice.chips:
        sides = [x for x in zip(tpu_slice.shape, tpu_slice.rings(), strict=True) if x[0] > 1]
    one = links.seconds("all-reduce", of_rows * config.dim * item, sides, tpu_slice.chip.link)
    logits = rows * config.vocab * 4
    last = links.seconds("all-gather", logits, sides, tpu_slice.chip.link)
    on_links = 2 * config.layers * one + last
    seconds = max(flops / flops_rate, nbytes / bytes_rate)
    return Program(flops, nbytes, seconds, on_links, 0.0, 2 * logits)


def _step(
    e: Experiment,
    engine: Engine,
    mesh: Mesh,
    tpu_slice: Slice,
    program: Program,
    rows: int,
    length: int,
) -> dict[str, Any]:
    """Facts about a step in which each row attends to `length` tokens."""
    flops_rate, bytes_rate = _rates(tpu_slice)
    of_rows = rows / mesh.batch_size
    cache_bytes = _cache_access(engine, rows, of_rows, length)
    attention = model.flops(e.model, length) - model.flops(e.model, 0)
    cache = max(cache_bytes / bytes_rate, attention * of_rows / mesh.tensor / flops_rate)
    on_chip = program.seconds + cache
    seconds = max(on_chip, program.hidden) + program.links - program.hidden
    is_dense = program.flops / flops_rate > program.nbytes / bytes_rate
    parts = {
        "matmuls" if is_dense else "reading weights": program.seconds,
        "reading the cache": cache,
        "collectives": program.links,
    }
    return {
        "rows": rows,
        "length": length,
        "step_seconds": seconds,
        "tokens_per_second": rows / seconds,
        "tokens_per_second_and_request": 1 / seconds,
        "weight_seconds": program.seconds,
        "cache_seconds": cache,
        "link_seconds": program.links,
        "bound": max(parts, key=parts.get),
        "flops_per_device": program.flops + attention * of_rows / mesh.tensor,
        "weight_bytes_per_device": program.nbytes,
        "cache_bytes_per_device": cache_bytes,
        "temp_bytes_per_device": program.temporaries,
        "compile_seconds": program.compile_seconds,
        "collectives": program.collectives and [x._asdict() for x in program.collectives],
    }


def _cache_access(engine: Engine, rows: int, of_rows: float, length: int) -> float:
    """Bytes that a device reads and writes in a step: it attends from `of_rows` of the rows to
    `length` tokens each, and writes all rows."""
    nbytes, slots = 0.0, WRITTEN // jnp.dtype(engine.dtype).itemsize
    for reach, page in engine.page_bytes().items():
        seen = length if reach is None else min(length, sum(reach))
        nbytes += page * (-(-seen // engine.page) * of_rows + 2 * rows * slots / engine.page)
    return nbytes


def _rates(tpu_slice: Slice) -> tuple[float, float]:
    """(FLOP/s, bytes/s) of a device."""
    chip = tpu_slice.chip
    return MATMUL * chip.flops / chip.devices, HBM * chip.hbm_bandwidth / chip.devices


def text(plan: Plan) -> str:
    """The plan as text."""
    size, capacity = terminal.size, plan["capacity_bytes_per_device"]
    left, tokens = plan["cache_bytes_per_device"], plan["cache_tokens"]
    lines = [
        f"{plan['experiment']} served on {plan['slice']}: {plan['chips']} chips "
        f"({plan['topology']}), mesh {plan['mesh']}",
        "",
        f"Memory      of {size(capacity)} per device: weights "
        f"{size(plan['weight_bytes_per_device'])} ({plan['weights_dtype']}), temporaries "
        f"{size(plan['temp_bytes_per_device'])}, {size(max(left, 0))} left for the cache",
    ]
    if not plan["fits"]:
        return "\n".join([*lines, f"            does not fit one sequence of {plan['context']:,}"])
    lines += [
        f"Cache       {tokens:,} tokens, {tokens // plan['context']:,} requests of "
        f"{plan['context']:,}: {plan['cache_dtype']}, pages of {plan['page']} tokens, "
        f"{size(plan['cache_bytes_per_token_and_device'])} per token and device",
        "",
        f"A step of decoding, each request at {plan['context']:,} tokens:",
        "",
        terminal.indent(terminal.table(_HEADER, [_row(each) for each in plan["decode"]])),
        "",
    ]
    prefill, seconds = plan["prefill"], [each["compile_seconds"] for each in plan["decode"]]
    lines += [
        f"Prompts     {prefill['tokens_per_second']:,.0f} tokens/s in steps of {prefill['rows']} "
        f"tokens, up to {plan['context']:,}; bound by {prefill['bound']}",
        f"Assumes     matmuls at {100 * MATMUL:.0f} % of the peak, memory traffic at "
        f"{100 * HBM:.0f} % of the bandwidth; "
        "without drawing tokens and the host",
    ]
    if plan["compiled"]:
        return "\n".join([*lines, f"Compiled in {terminal.duration(sum(seconds))}"])
    return "\n".join([*lines, "Estimated: the programs were not compiled"])


_HEADER = ("requests", "step", "tokens/s each", "tokens/s", "weights", "cache", "links", "bound by")


def _row(step: dict[str, Any]) -> tuple[str, ...]:
    parts = (step[f"{part}_seconds"] for part in ("weight", "cache", "link"))
    return (
        f"{step['rows']:,}",
        _milliseconds(step["step_seconds"]),
        f"{step['tokens_per_second_and_request']:,.0f}",
        f"{step['tokens_per_second']:,.0f}",
        *map(_milliseconds, parts),
        step["bound"] if step["fits"] else "the cache holds fewer",
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
