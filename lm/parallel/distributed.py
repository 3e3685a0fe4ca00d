"""Multi-host runs: initialization, the main process, barriers, and agreement between processes."""

import glob
import importlib.util
import os
import sys

import jax
import numpy as np
from jax._src import distributed as coordination  # JAX has no public name for its client
from jax.experimental import multihost_utils

from lm.errors import UserError
from lm.parallel import peers

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
    """Connects to the other processes of this run. Does nothing on a single host or on later calls.

    Detects a TPU pod slice, Slurm (`srun`) and Open MPI from the environment. Elsewhere set
    JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=n JAX_PROCESS_ID=i.
    """
    if jax.distributed.is_initialized():
        return
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":  # JAX sets it where there is no TPU
        # libtpu prints warnings when these are unset; needed when it is installed only for
        # ahead-of-time compilation.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if any(name in os.environ for name in _VARIABLES):
        address, count, index = _from_environment()
        if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            _reserve_stdout_for_python()
        jax.distributed.initialize(address, count, index)
    elif _in_cluster() or _on_tpu_pod():
        jax.distributed.initialize()
    else:
        return
    _watch_peers()


def _watch_peers() -> None:
    state = coordination.global_state
    host = state.coordinator_address.rsplit(":", 1)[0].strip("[]")
    peers.watch(state.client, host, state.process_id, state.num_processes)


def _reserve_stdout_for_python() -> None:
    """Redirects the output of C++ code to standard error: Gloo prints messages to standard output,
    in pieces."""
    if sys.stdout is not sys.__stdout__:  # replaced by a notebook or a test
        return
    sys.stdout.flush()
    descriptor = os.dup(1)
    os.dup2(2, 1)
    buffering = 1 if sys.stdout.isatty() else -1  # 1: by line
    sys.stdout = os.fdopen(descriptor, "w", buffering=buffering, encoding=sys.stdout.encoding)


def _from_environment() -> tuple[str, int, int]:
    """(coordinator address, number of processes, index of this process). Raises UserError."""
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"{', '.join(missing)} must be set too: "
            f"a run on several hosts needs {', '.join(_VARIABLES)}."
        )
    address, *numbers = (os.environ[name] for name in _VARIABLES)
    for name, number in zip(_VARIABLES[1:], numbers, strict=True):
        if not number.isdigit():
            raise UserError(f"{name}={number!r} must be a whole number.")
    count, index = map(int, numbers)
    if index >= count:
        raise UserError(f"JAX_PROCESS_ID={index} must be below JAX_NUM_PROCESSES={count}.")
    return address, count, index


def _in_cluster() -> bool:
    # SLURM_NTASKS is also set in the shell of an allocation, before anything is launched.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE") or "1"
    return int(tasks) > 1


def _on_tpu_pod() -> bool:
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return False
    if "TPU_WORKER_HOSTNAMES" in os.environ:  # GKE, and machines with a single host
        return "," in os.environ["TPU_WORKER_HOSTNAMES"]
    # A Cloud TPU VM: jax asks the metadata server for the other hosts of the slice.
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    queries_metadata = "TPU_SKIP_MDS_QUERY" not in os.environ
    return bool(chips) and queries_metadata and importlib.util.find_spec("libtpu") is not None


def is_main() -> bool:
    """Whether this is process 0, which writes files, terminal output and tracker logs."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Logical or of `flag` over all processes; the same result on each."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def check_shared(folder: object, step: int | None) -> None:
    """Checks that every process sees the same newest checkpoint in `folder` as process 0.

    Args:
      step: of the newest checkpoint that this process sees, None without one.

    Raises:
      UserError: on each process that sees another one, because its disk is not shared.
    """
    if jax.process_count() == 1:
        return
    local = -1 if step is None else step
    main = int(multihost_utils.broadcast_one_to_all(np.int32(local)))
    if local != main:
        seen = [f"a checkpoint of step {n}" if n >= 0 else "none" for n in (local, main)]
        raise UserError(
            f"{folder} holds {seen[0]} for process {jax.process_index()} and {seen[1]} for "
            "process 0; give a --workdir on storage that all hosts share."
        )


_AGREE_EVERY = 16


def agree(flag: bool, step: int) -> bool:
    """`any_process` for a flag that may rise at any step, such as a signal or a time limit.

    Several processes communicate only at every 16th step, because that waits for the device; a
    single process answers at every step.
    """
    if jax.process_count() == 1:
        return flag
    return step % _AGREE_EVERY == 0 and any_process(flag)
