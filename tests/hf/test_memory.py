"""An import needs little more host memory than the shards of that host's devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import big_folder
import numpy as np
import pytest
import virtual_devices

ROOT = Path(__file__).parents[2]


def measure(folder: Path, mesh: str, devices: int, processes: int = 1) -> list[dict]:
    """Returns the results of `bench import` in each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    for index in range(processes):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "XLA_FLAGS": virtual_devices.flags(devices),
        }
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        command = ["-m", "lm", "bench", "import", str(folder), "--json", "--mesh", mesh]
        running.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=600) for process in running]
    assert all(process.returncode == 0 for process in running), outputs[0][1][-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.slow
def test_peak_memory_is_close_to_the_size_of_the_weights(tmp_path):
    """The weights take 0.7 GB; each of two processes keeps half. Fixed costs (libraries, threads,
    read buffers) are a larger fraction here than for a larger model."""
    unrelated = np.ones(200_000_000)  # 1.6 GB in this process that must not be counted
    folder = tmp_path / "big"
    big_folder.write(folder, layers=8, dim=2048, vocab=16_384, shard_bytes=300_000_000)
    (one,) = measure(folder, "fsdp=2,tensor=4", 8)
    assert one["bytes_kept"] == pytest.approx(one["bytes"], rel=0.01)
    assert one["memory_over_kept"] < 1.25
    for host in measure(folder, "fsdp=2,tensor=4", 4, processes=2):
        assert host["bytes_kept"] == pytest.approx(one["bytes"] / 2, rel=0.01)
        assert host["memory_over_kept"] < 1.25
    del unrelated
