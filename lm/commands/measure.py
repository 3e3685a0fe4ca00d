"""Times a training step against the machine's matmul rate, and reading the weights of a Hugging
Face folder against a plain read of the same files. Both sides are measured in one process."""

import importlib
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from etils import epath

from lm import folders, hf, model, runs, terminal, training, trees
from lm.data.batch import Batch, extend
from lm.errors import UserError
from lm.experiment import Experiment
from lm.parallel import hardware, sharding
from lm.parallel.mesh import Mesh
from lm.program import Program, assemble, use_compilation_cache
from lm.start import frozen_models

WARM_UP = 2  # untimed steps


def find(target: str) -> Experiment:
    """The experiment of a module ('experiments.bench_llama') or of a run folder."""
    if (epath.Path(target) / "experiment.json").exists():
        return runs.load_declaration(target)
    try:
        module = importlib.import_module(target)
    except (ModuleNotFoundError, TypeError, ValueError) as error:
        name = getattr(error, "name", target.strip(".")) or ""
        if not target.startswith(name) and not target.startswith("."):
            raise
        raise UserError(
            f"{target!r} is neither a run folder nor a module; name it as in "
            "experiments.bench_llama or runs/stdlib."
        ) from None
    if not callable(getattr(module, "experiment", None)):
        raise UserError(f"{target} declares no experiment(): it is not an experiment file.")
    return module.experiment()


def step(
    experiment: Experiment, *, on: str | None = None, mesh: Mesh | None = None, steps: int = 20
) -> dict[str, Any]:
    """Times `steps` training steps on random tokens.

    The matmul rate is the median of measurements before, between and after the steps, because the
    speed of a shared machine drifts. MFU is train_flops * tokens/s over that rate.
    """
    use_compilation_cache()
    program = assemble(experiment, on, mesh, folders.models_of(experiment))
    batch = _random_batch(program)
    start = time.perf_counter()
    abstract, frozen = program.abstract
    compiled = program.step.lower(abstract, batch, frozen).compile()
    compile_seconds = time.perf_counter() - start
    state, frozen = program.init()
    frozen = training.with_models(frozen, frozen_models(program))
    state, metrics = compiled(state, batch, frozen)
    jax.block_until_ready(metrics)
    to_first = seconds_since_start()

    seconds: list[float] = []
    rates: list[float] = []
    dtype = experiment.precision.compute
    for index in range(WARM_UP + steps):
        if index >= WARM_UP and (index - WARM_UP) % max(steps // 4, 1) == 0:
            rates.append(hardware.matmul_flops(dtype))
        start = time.perf_counter()
        state, metrics = compiled(state, batch, frozen)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    seconds = seconds[WARM_UP:]
    rates.append(hardware.matmul_flops(dtype))
    devices = 1 if jax.default_backend() == "cpu" else program.mesh.devices.size
    rate = statistics.median(rates) * devices
    median = statistics.median(seconds)
    tokens = batch.tokens.size
    flops = model.train_flops(experiment.model, experiment.batch.length)
    return {
        "experiment": experiment.name,
        "device": program.mesh.devices.flat[0].device_kind,
        "devices": program.mesh.devices.size,
        "steps": steps,
        "tokens_per_step": tokens,
        "seconds_per_step": median,
        "seconds_per_step_range": [min(seconds), max(seconds)],
        "tokens_per_second": tokens / median,
        "start_to_first_step_seconds": to_first,
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": peak_memory(),
        "matmul_flops_per_second": rate,
        "matmul_flops_per_second_range": [min(rates) * devices, max(rates) * devices],
        "model_flops_per_token": flops,
        "model_flops_utilization": flops * tokens / median / rate,
        "loss": float(metrics["loss"]),
    }


def reading(folder: str | os.PathLike, *, mesh: Mesh | None = None) -> dict[str, Any]:
    """Times reading the weights of a Hugging Face folder onto one device or a mesh.

    A plain read of the same files is timed before and after. An untimed read comes first, so that
    all timed ones find the files in the system's cache.

    `memory_over_kept` is the growth of the process's peak memory over the bytes of weights that
    this host keeps. It is meaningful on CPUs only; elsewhere the weights are on the devices.
    """
    pretrained = hf.Pretrained(folder)
    built = mesh.build() if mesh else None
    config = pretrained.config
    axes, shapes = model.axes(config), model.shapes(config)
    shardings = sharding.weight_shardings(axes, shapes, built) if built else None
    files = sorted(epath.Path(folder).glob("*.safetensors"))
    _plain_read(files)
    plain = [_plain_read(files)]
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    cpu_start = time.process_time()
    params = jax.block_until_ready(pretrained.params(shardings))
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu_start
    peak = _peak_resident()
    plain.append(_plain_read(files))
    shards = [shard for x in jax.tree.leaves(params) for shard in x.addressable_shards]
    kept, size = sum(shard.data.nbytes for shard in shards), trees.nbytes(params)
    return {
        "folder": str(folder),
        "family": pretrained.family.architecture,
        "device": jax.devices()[0].device_kind,
        "devices": built.size if built else 1,
        "bytes": size,
        "bytes_kept": kept,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "bytes_per_second": size / seconds,
        "plain_bytes_per_second": size / statistics.median(plain),
        "peak_memory_bytes": peak,
        "memory_over_kept": (peak - before) / kept,
    }


def _plain_read(files: list[epath.Path]) -> float:
    """Seconds to read these files from end to end into one small buffer."""
    buffer, start = bytearray(1 << 22), time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def reading_text(measured: dict[str, Any]) -> str:
    """The measurements of `reading` as a table."""
    m = measured
    rows = [
        ("weights", terminal.size(m["bytes"])),
        ("read onto the devices", f"{m['bytes_per_second'] / 1e9:.2f} GB/s"),
        ("seconds", f"{m['seconds']:.1f}, {m['cpu_seconds']:.1f} of a core"),
        ("a plain read", f"{m['plain_bytes_per_second'] / 1e9:.2f} GB/s"),
        ("peak memory over weights", f"{m['memory_over_kept']:.2f}"),
        ("peak memory", terminal.size(m["peak_memory_bytes"])),
    ]
    return terminal.table((f"{m['family']} on {m['devices']} x {m['device']}", ""), rows)


def seconds_since_start() -> float:
    """Seconds since this process was started."""
    if sys.platform != "linux":
        return time.time() - psutil.Process().create_time()
    # Not psutil: it adds the boot time, which Linux gives in whole seconds.
    start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start / os.sysconf("SC_CLK_TCK")


def _random_batch(program: Program) -> Batch:
    """Uniformly random tokens, one document per sequence."""
    experiment = program.experiment
    shape = (experiment.batch.sequences_at(0), experiment.batch.length)
    tokens = np.random.default_rng(0).integers(0, experiment.model.vocab, (shape[0], shape[1] + 1))
    tokens = tokens.astype(np.int32)
    ones = np.ones(shape, np.int32)
    batch = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=ones.astype(np.float32),
        segments=ones,
        positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    )
    formats = experiment.objective.stored_fields().items()
    zeros = {name: np.zeros((*shape, *each.shape), each.base) for name, each in formats}
    batch = extend(batch, zeros)
    return program.put(lambda rows: type(batch)(*(x[rows] for x in batch)), shape[0])


def peak_memory() -> int:
    """Peak bytes of the fullest device if devices report it, else resident bytes of the process."""
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    known = [peak for peak in peaks if peak]
    return max(known) if known else _peak_resident()


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its value includes that of the parent process before exec.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def step_text(measured: dict[str, Any]) -> str:
    """The measurements of `step` as a table."""
    m = measured
    low, high = m["seconds_per_step_range"]
    rows = [
        ("seconds per step", f"{m['seconds_per_step']:.3f} (from {low:.3f} to {high:.3f})"),
        ("tokens per second", f"{m['tokens_per_second']:,.0f}"),
        ("start to first step", terminal.duration(m["start_to_first_step_seconds"])),
        ("compile time", terminal.duration(m["compile_seconds"])),
        ("peak memory", terminal.size(m["peak_memory_bytes"])),
        ("matmul rate", terminal.flops(m["matmul_flops_per_second"])),
        ("MFU against it", f"{100 * m['model_flops_utilization']:.1f} %"),
    ]
    return terminal.table((f"{m['experiment']} on {m['devices']} x {m['device']}", ""), rows)
