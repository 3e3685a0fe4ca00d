"""Compiles programs ahead of time for a TPU slice, such as the training step: libtpu contains the
compiler of every TPU generation and needs no TPU."""

import contextlib
import glob
import importlib.util
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from lm.errors import UserError
from lm.experiment import Experiment
from lm.folders import models_of
from lm.parallel.mesh import Place
from lm.planning import hlo
from lm.planning.slices import Slice
from lm.program import assemble_at

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not query the metadata server of a Cloud TPU VM
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans may run on one machine
    "TPU_MIN_LOG_LEVEL": "3",
}


class Live(NamedTuple):
    """An array in memory at the time of peak usage; `source` is the parameter or the operation that
    produces it."""

    nbytes: int
    shape: str
    source: str


class Compiled(NamedTuple):
    """The compiled step and the compiler's report, per device.

    program    None when the step does not fit
    peak       bytes of state and temporaries in the compiler's memory layout; when the step does
               not fit, bytes that it would need
    arguments  bytes of the step's arguments: state and batch
    slots      temp_size_in_bytes of jax's memory_analysis: total size of all slots of the layout,
               including slots that share addresses
    host       bytes in host memory
    live       arrays at the time of peak usage, the largest first
    seconds    compile time
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
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def describe(tpu_slice: Slice) -> list[Any]:
    """Device descriptions of the slice, or slices, for ahead-of-time compilation."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    num_slices = {"num_slices": tpu_slice.count} if tpu_slice.count > 1 else {}
    return topologies.get_topology_desc(
        platform="tpu", topology_name=tpu_slice.topology, **num_slices
    ).devices


def step(experiment: Experiment, name: str, place: Place, tpu_slice: Slice) -> Compiled:
    """Compiles the training step. Raises UserError if the mesh does not match the slice, or the
    compiler does not support it."""
    devices = describe(tpu_slice)
    program = assemble_at(experiment, name, place, devices, models_of(experiment))
    arguments = (*program.abstract, program.abstract_batch)
    where = f"mesh {place.mesh} on {tpu_slice.topology}"
    return build(program.lower, arguments, program.mesh, where)


def build(
    lower: Callable[[], jax.stages.Lowered], arguments: Any, mesh: jax.sharding.Mesh, where: str
) -> Compiled:
    """Lowers and compiles a program with these abstract `arguments`. Raises UserError, with `where`
    in it, if the compiler does not support the program."""
    start = time.perf_counter()
    lowered = lower()
    with tempfile.TemporaryDirectory() as folder, _without_cache():
        # The compiler writes its report of memory usage only to files.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            seconds = time.perf_counter() - start
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise _unsupported(error, where) from error
            return _does_not_fit(error, mesh, nbytes(arguments), seconds)
        seconds = time.perf_counter() - start
        text = compiled.as_text()
        parsed = hlo.parse(text)
        memory = compiled.memory_analysis()
        live = _live(folder, parsed)
        peak = _peak(folder)
    return Compiled(
        program=parsed,
        mesh=mesh,
        fits=True,
        peak=peak or memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        slots=memory.temp_size_in_bytes,
        host=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        live=live,
        seconds=seconds,
    )


@contextlib.contextmanager
def _without_cache():
    """Disables the compilation cache, whose programs come without the compiler's report."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax reads the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def nbytes(arguments: Any) -> int:
    """Bytes per device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arguments)
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


def _unsupported(error: Exception, where: str) -> UserError:
    """Quotes the compiler's error, without its source locations."""
    message = re.sub(r"\(\S+\.cc:\d+\)", "", str(error).splitlines()[0])
    return UserError(
        f"libtpu's compiler does not support {where}; choose another mesh. Its error: {message}"
    )


def _does_not_fit(error: Exception, mesh: Any, arguments: int, seconds: float) -> Compiled:
    """Parses the compiler's out-of-memory error."""
    message = str(error)
    used = _bytes_of(re.search(rf"Used {_SIZE}i?B? of", message))
    if not used:  # failed before memory layout: this message counts temporaries alone
        used = arguments + _bytes_of(re.search(rf"\({_SIZE}i?B?\) exceeds", message))
    largest = re.findall(
        rf'Size: {_SIZE}i?B?\n\s*Operator: op_name="([^"]*)"(?:[^\n]*\n)*?\s*Shape: (\S+?)\{{',
        message,
    )
    live = [
        Live(int(float(size) * _UNITS[unit]), shape, name) for size, unit, name, shape in largest
    ]
    return Compiled(None, mesh, False, int(used), arguments, 0, 0, live, seconds)


def _bytes_of(match: re.Match | None) -> float:
    return float(match.group(1)) * _UNITS[match.group(2)] if match else 0


def _file(folder: str, kind: str) -> str:
    """Text of the compiler's report of this kind, '' without one."""
    paths = glob.glob(f"{folder}/*after_optimizations-{kind}.txt")
    return open(max(paths, key=os.path.getsize)).read() if paths else ""


def _peak(folder: str) -> int:
    """Peak bytes of HBM, from the report of memory usage; 0 without one."""
    report = _file(folder, "memory-usage-report")
    match = re.search(r"Memory Space: default.*\nTotal bytes: (\d+)", report)
    return int(match.group(1)) if match else 0


def _live(folder: str, program: hlo.Program) -> list[Live]:
    """Arrays in HBM at the time of peak usage, from the report of live ranges, with shapes and
    sources."""
    report = _file(folder, "live-range")
    _, _, at_peak = report.partition("(peak):\n")
    instructions = {i.name: i for body in program.computations.values() for i in body}
    layout = _layout(folder)
    live = []
    for line in at_peak.splitlines():
        match = re.match(r"\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes", line)
        if not match:
            break
        name, index, nbytes = match.group(1), match.group(2), int(match.group(3))
        instruction = instructions.get(name)
        arrays = instruction.arrays if instruction else ()
        position = int(index.split(",")[0] or 0)
        # Values of a loop are missing in the layout, those of a fusion in the program.
        array = layout.get((name, index)) or next(iter(arrays[position:]), None)
        if array is None or array.space == hlo.HBM:
            source = instruction.op_name if instruction else ""
            live.append(Live(nbytes, str(array or "?"), source or name))
    return sorted(live, reverse=True)


def _layout(folder: str) -> dict[tuple[str, str], hlo.Array]:
    """{(instruction, index into its result such as '0,1'): array}."""
    values = re.findall(
        r"value: <\d+ ([\w.\-]+)(?:\{([\d,]*)\})? @\d+> \(size=\d+,offset=\d+\): (\S+)",
        _file(folder, "buffer-assignment"),
    )
    shapes = ((name, index, hlo.arrays(shape)) for name, index, shape in values)
    return {(name, index): arrays[0] for name, index, arrays in shapes if arrays}
