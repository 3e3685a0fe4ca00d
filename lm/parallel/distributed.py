"""Several hosts: start-up, who writes, and how the hosts agree."""

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

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
    """Joins the other processes of this run; does nothing on a single host, or when called twice.

    They are found through the environment: a TPU pod slice, Slurm (`srun`), Open MPI, or by hand
    with JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=n JAX_PROCESS_ID=i.
    """
    if jax.distributed.is_initialized():
        return
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":  # JAX sets it where there is no TPU
        # A libtpu that is here only to plan with prints a page for want of these.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if any(name in os.environ for name in _BY_HAND):
        address, count, index = _by_hand()
        if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            _keep_standard_output_ours()
        jax.distributed.initialize(address, count, index)
    elif _in_cluster() or _on_tpu_pod():
        jax.distributed.initialize()
    else:
        return
    _watch_the_others()


def _watch_the_others() -> None:
    joined = coordination.global_state
    host = joined.coordinator_address.rsplit(":", 1)[0].strip("[]")
    peers.watch(joined.client, host, joined.process_id, joined.num_processes)


def _keep_standard_output_ours() -> None:
    """From here on only Python writes to standard output: Gloo, in C++, greets there in pieces."""
    if sys.stdout is not sys.__stdout__:  # a notebook's or a test's, which is not the process's
        return
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    line_by_line = 1 if sys.stdout.isatty() else -1
    sys.stdout = os.fdopen(ours, "w", buffering=line_by_line, encoding=sys.stdout.encoding)


def _by_hand() -> tuple[str, int, int]:
    missing = [name for name in _BY_HAND if name not in os.environ]
    if missing:
        raise UserError(
            f"{', '.join(missing)} must be set too: "
            f"a run on several hosts needs {', '.join(_BY_HAND)}."
        )
    address, *numbers = (os.environ[name] for name in _BY_HAND)
    for name, number in zip(_BY_HAND[1:], numbers, strict=True):
        if not number.isdigit():
            raise UserError(f"{name}={number!r} must be a whole number.")
    count, index = map(int, numbers)
    if index >= count:
        raise UserError(f"JAX_PROCESS_ID={index} must be below JAX_NUM_PROCESSES={count}.")
    return address, count, index


def _in_cluster() -> bool:
    # SLURM_NTASKS would also be set in the shell of an allocation, where nothing was launched yet.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE") or "1"
    return int(tasks) > 1


def _on_tpu_pod() -> bool:
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return False
    if "TPU_WORKER_HOSTNAMES" in os.environ:  # GKE, and machines with a single host
        return "," in os.environ["TPU_WORKER_HOSTNAMES"]
    # A Cloud TPU VM: jax asks the metadata server for the other hosts of the slice.
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    asks = "TPU_SKIP_MDS_QUERY" not in os.environ
    return bool(chips) and asks and importlib.util.find_spec("libtpu") is not None


def is_main() -> bool:
    """Whether this process writes: files, the terminal, the tracker."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """True everywhere if it is true on any process, as when one host is told to stop."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def check_shared(folder: object, step: int | None) -> None:
    """That every process finds the same newest checkpoint as process 0 in the run's folder. Raises
    UserError on those that do not: they look into another disk."""
    if jax.process_count() == 1:
        return
    mine = -1 if step is None else step
    first = int(multihost_utils.broadcast_one_to_all(np.int32(mine)))
    if mine != first:
        found = [f"a checkpoint of step {n}" if n >= 0 else "none" for n in (mine, first)]
        raise UserError(
            f"{folder} holds {found[0]} for process {jax.process_index()} and {found[1]} for "
            "process 0; give a --workdir on storage that all hosts share."
        )


_AGREE_EVERY = 16


def agree(flag: bool, step: int) -> bool:
    """`any_process` for a flag that may rise at any moment, such as a signal or a clock.

    Several processes ask one another only at every 16th step, because asking waits for the
    device; a single one answers at every step.
    """
    if jax.process_count() == 1:
        return flag
    return step % _AGREE_EVERY == 0 and any_process(flag)
