"""Several hosts: start-up, who writes, and how the hosts agree."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

# Set by cluster managers where jax.distributed.initialize() needs no argument.
_CLUSTER_VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "COORDINATOR_ADDRESS",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
)


def initialize() -> None:
    """Joins the other processes where the environment names them: a TPU pod slice, Slurm, Open MPI, or by hand with
    JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=n JAX_PROCESS_ID=i. Does nothing on a single host, or twice."""
    if jax.distributed.is_initialized() or not (_is_tpu_pod() or _in_cluster()):
        return
    if "JAX_NUM_PROCESSES" in os.environ:
        if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )
    else:
        jax.distributed.initialize()


def _is_tpu_pod() -> bool:
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def _in_cluster() -> bool:
    tasks = os.environ.get("SLURM_NTASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE")
    return int(tasks) > 1 if tasks else any(name in os.environ for name in _CLUSTER_VARIABLES)


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
