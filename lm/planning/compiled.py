"""The training step, compiled for a slice that is only described: libtpu has the compiler of every
TPU, and needs none of them."""

import contextlib
import glob
import importlib.util
import math
import os
import re
import tempfile
import time
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from lm import run
from lm.errors import UserError
from lm.experiment import Experiment
from lm.parallel.mesh import Place
from lm.planning import hlo
from lm.planning.slices import Slice

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask which machine this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans at a time may share a machine
    "TPU_MIN_LOG_LEVEL": "3",
}


class Live(NamedTuple):
    """An array in memory at the fullest moment; `source` is the parameter or the part of the
    program that makes it."""

    nbytes: int
    shape: str
    source: str


class Compiled(NamedTuple):
    """The compiled step and what the compiler says of it, per device.

    peak       bytes of state and temporaries, as the compiler lays them out; when the step does not
               fit, what it would need
    arguments  bytes of what the step is given: state and batch
    slots      what jax's memory_analysis calls temp_size_in_bytes: the sizes of all slots of the
               layout, also of those that share addresses
    live       at the fullest moment, the largest first
    """

    program: hlo.Program | None
    mesh: jax.sharding.Mesh
    fits: bool
    peak: int
    arguments: int
    slots: int
    host: int
    live: list[Live]
    seconds: float


def available() -> bool:
    """Whether the compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def describe(where: Slice) -> list[Any]:
    """The devices of the slice, or slices, as far as a compiler needs them."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    several = {"num_slices": where.count} if where.count > 1 else {}
    return topologies.get_topology_desc(
        platform="tpu", topology_name=where.topology, **several
    ).devices


def step(experiment: Experiment, name: str, place: Place, where: Slice) -> Compiled:
    """Compiles the step that training would run. Raises UserError where the mesh does not fit the
    slice, or the compiler can't do with it."""
    devices = describe(where)
    program = run.assemble_at(experiment, name, place, devices)
    began = time.perf_counter()
    given = program.abstract, program.abstract_batch()
    lowered = program.step.lower(*given)
    with tempfile.TemporaryDirectory() as folder, _without_cache():
        # The compiler's own report of its memory is to be had only as a file.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            took = time.perf_counter() - began
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise _not_compiled(error, place, where) from error
            return _too_large(error, program.mesh, _nbytes(given), took)
        took = time.perf_counter() - began
        text = compiled.as_text()
        parsed = hlo.parse(text)
        memory = compiled.memory_analysis()
        live = _live(folder, parsed)
        total = _total(folder)
    return Compiled(
        program=parsed,
        mesh=program.mesh,
        fits=True,
        peak=total or memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        slots=memory.temp_size_in_bytes,
        host=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        live=live,
        seconds=took,
    )


@contextlib.contextmanager
def _without_cache():
    """A program from the cache would come without the report."""
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax looks at the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()


def _nbytes(given: Any) -> int:
    """Per device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(given)
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


def _not_compiled(error: Exception, place: Place, where: Slice) -> UserError:
    """What the compiler lacks, in its own words."""
    said = re.sub(r"\(\S+\.cc:\d+\)", "", str(error).splitlines()[0])
    return UserError(
        f"mesh {place.mesh} on {where.topology} is more than libtpu's compiler can do; choose "
        f"another mesh. It says: {said}"
    )


def _too_large(error: Exception, mesh: Any, arguments: int, took: float) -> Compiled:
    """What the compiler says when memory does not suffice."""
    said = str(error)
    used = _bytes_of(re.search(rf"Used {_SIZE}i?B? of", said))
    if not used:  # refused before anything was laid out: this counts temporaries alone
        used = arguments + _bytes_of(re.search(rf"\({_SIZE}i?B?\) exceeds", said))
    listed = re.findall(
        rf'Size: {_SIZE}i?B?\n\s*Operator: op_name="([^"]*)"(?:[^\n]*\n)*?\s*Shape: (\S+?)\{{', said
    )
    live = [
        Live(int(float(size) * _UNITS[unit]), shape, name) for size, unit, name, shape in listed
    ]
    return Compiled(None, mesh, False, int(used), arguments, 0, 0, live, took)


def _bytes_of(found: re.Match | None) -> float:
    return float(found.group(1)) * _UNITS[found.group(2)] if found else 0


def _file(folder: str, kind: str) -> str:
    found = glob.glob(f"{folder}/*after_optimizations-{kind}.txt")
    return open(max(found, key=os.path.getsize)).read() if found else ""


def _total(folder: str) -> int:
    """Of the chip's main memory, from the report of what is laid out where."""
    report = _file(folder, "memory-usage-report")
    found = re.search(r"Memory Space: default.*\nTotal bytes: (\d+)", report)
    return int(found.group(1)) if found else 0


def _live(folder: str, program: hlo.Program) -> list[Live]:
    """What the report of live ranges lists at the peak in the chip's main memory, with shapes and
    sources."""
    report = _file(folder, "live-range")
    _, _, at_peak = report.partition("(peak):\n")
    instructions = {i.name: i for body in program.computations.values() for i in body}
    laid_out = _laid_out(folder)
    live = []
    for line in at_peak.splitlines():
        found = re.match(r"\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes", line)
        if not found:
            break
        name, index, nbytes = found.group(1), found.group(2), int(found.group(3))
        each = instructions.get(name)
        arrays, place = each.arrays if each else (), int(index.split(",")[0] or 0)
        # A loop's values are not in the layout by this name, a fusion's not in the program.
        array = laid_out.get((name, index)) or next(iter(arrays[place:]), None)
        if array is None or array.space == 0:
            source = each.op_name if each else ""
            live.append(Live(nbytes, str(array or "?"), source or name))
    return sorted(live, reverse=True)


def _laid_out(folder: str) -> dict[tuple[str, str], hlo.Array]:
    """(instruction, place in its result as in '0,1') -> the array."""
    found = re.findall(
        r"value: <\d+ ([\w.\-]+)(?:\{([\d,]*)\})? @\d+> \(size=\d+,offset=\d+\): (\S+)",
        _file(folder, "buffer-assignment"),
    )
    shapes = ((name, index, hlo.arrays(shape)) for name, index, shape in found)
    return {(name, index): arrays[0] for name, index, arrays in shapes if arrays}
