"""Seconds of a training step beside the machine's matmul rate, and of reading a Hugging Face folder
beside a plain read of the same files; each measured in one process."""

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

from lm import hf, model, runs, terminal, trees
from lm.data.batch import Batch
from lm.errors import UserError
from lm.experiment import Experiment
from lm.parallel import hardware, sharding
from lm.parallel.mesh import Mesh
from lm.program import Program, assemble, use_compilation_cache

WARM_UP = 2


def find(target: str) -> Experiment:
    """The experiment of a module ('experiments.bench_llama') or of a run folder."""
    written = epath.Path(target) / "experiment.json"
    if written.exists():
        return runs.load_declaration(target)
    try:
        module = importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is None or not target.startswith(error.name):
            raise
        raise UserError(
            f"{target!r} is neither a run folder nor a module; name it as in "
            "experiments.bench_llama or runs/stdlib."
        ) from None
    if not hasattr(module, "experiment"):
        raise UserError(f"{target} declares no experiment(): it is not an experiment file.")
    return module.experiment()


def step(
    experiment: Experiment, *, on: str | None = None, mesh: Mesh | None = None, steps: int = 20
) -> dict[str, Any]:
    """Runs `steps` training steps on random tokens, and measures the matmul rate between them.

    The matmul rate is measured before, in the middle of and after the steps, and the median taken,
    since a shared machine's speed drifts. MFU is train_flops * tokens/s over that rate.
    """
    use_compilation_cache()
    program = assemble(experiment, on, mesh)
    batch = _random_batch(program)
    began = time.perf_counter()
    abstract, frozen = program.abstract
    compiled = program.step.lower(abstract, batch, frozen).compile()
    compile_seconds = time.perf_counter() - began
    state, frozen = program.init()
    state, metrics = compiled(state, batch, frozen)
    jax.block_until_ready(metrics)
    to_first = _seconds_since_start()

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
        "peak_memory_bytes": _peak_memory(),
        "matmul_flops_per_second": rate,
        "matmul_flops_per_second_range": [min(rates) * devices, max(rates) * devices],
        "model_flops_per_token": flops,
        "model_flops_utilization": flops * tokens / median / rate,
        "loss": float(metrics["loss"]),
    }


def reading(folder: str | os.PathLike, *, mesh: Mesh | None = None) -> dict[str, Any]:
    """Reads the weights of a Hugging Face folder onto one device or a mesh, and the same files
    plainly, before and after; the first read of all is not counted, so that both find the files in
    the system's cache.

    Memory is that of the process: its peak less what it took before, over the bytes of weights that
    this host keeps (on a CPU; elsewhere they are on the devices).
    """
    pretrained = hf.Pretrained(folder)
    built = mesh.build() if mesh else None
    config = pretrained.config
    axes, shapes = model.axes(config), model.shapes(config)
    where = sharding.weight_shardings(axes, shapes, built) if built else None
    files = sorted(epath.Path(folder).glob("*.safetensors"))
    _plain_read(files)
    plain = [_plain_read(files)]
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    worked = time.process_time()
    params = jax.block_until_ready(pretrained.params(where))
    seconds, worked = time.perf_counter() - started, time.process_time() - worked
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
        "cpu_seconds": worked,
        "bytes_per_second": size / seconds,
        "plain_bytes_per_second": size / statistics.median(plain),
        "peak_memory_bytes": peak,
        "memory_over_kept": (peak - before) / kept,
    }


def _plain_read(files: list[epath.Path]) -> float:
    """Seconds to read these files from end to end into one small buffer."""
    buffer, started = bytearray(1 << 22), time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def reading_text(measured: dict[str, Any]) -> str:
    """For a person."""
    m = measured
    rows = [
        ("weights", terminal.size(m["bytes"])),
        ("read onto the devices", f"{m['bytes_per_second'] / 1e9:.2f} GB/s"),
        ("seconds", f"{m['seconds']:.1f}, {m['cpu_seconds']:.1f} of a core"),
        ("a plain read", f"{m['plain_bytes_per_second'] / 1e9:.2f} GB/s"),
        ("memory over what is kept", f"{m['memory_over_kept']:.2f}"),
        ("peak memory", terminal.size(m["peak_memory_bytes"])),
    ]
    return terminal.table((f"{m['family']} on {m['devices']} x {m['device']}", ""), rows)


def _seconds_since_start() -> float:
    """Since this process began."""
    if sys.platform != "linux":
        return time.time() - psutil.Process().create_time()
    # psutil adds the time of boot, which Linux tells in whole seconds: up to one too many.
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")


def _random_batch(program: Program) -> Batch:
    """Tokens drawn evenly, one document per sequence."""
    experiment = program.experiment
    shape = (experiment.batch.sequences_at(0), experiment.batch.length)
    drawn = np.random.default_rng(0).integers(0, experiment.model.vocab, (shape[0], shape[1] + 1))
    drawn = drawn.astype(np.int32)
    ones = np.ones(shape, np.int32)
    batch = Batch(
        tokens=drawn[:, :-1],
        targets=drawn[:, 1:],
        weights=ones.astype(np.float32),
        segments=ones,
        positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    )
    return program.put(lambda rows: Batch(*(x[rows] for x in batch)), shape[0])


def _peak_memory() -> int:
    """Bytes: of the fullest device where it can tell, else of the process (resident)."""
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    known = [peak for peak in peaks if peak]
    return max(known) if known else _peak_resident()


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its figure begins with that of the process that started this one.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def text(measured: dict[str, Any]) -> str:
    """For a person."""
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
