"""Losses and gradients on meshes of 8 virtual devices equal those on one device. mesh_worker.py
computes them in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import virtual_devices

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("mesh_worker.py")
# Collectives in program order; see tests/parallel/test_meshes.py.
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
MESHES = ("fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2")


@pytest.mark.slow
def test_meshes_equal_one_device(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "XLA_FLAGS": virtual_devices.flags(8, IN_ORDER),
    }
    command = [sys.executable, str(WORKER), str(tmp_path), *MESHES]
    subprocess.run(command, env=environment, check=True, timeout=600)
    alone = dict(np.load(tmp_path / "alone.npz"))
    assert alone["dpo/loss/weight"] == 14
    assert np.abs(alone["distill/gradient/blocks/0/attention/q"]).max() > 0.1
    for mesh in MESHES:
        for path, got in np.load(tmp_path / f"{mesh}.npz").items():
            # float32 sums in another order: a few units of 6e-8, also through the layers. Rewards
            # are differences of sums of log-probabilities.
            largest = 100 if path.endswith(("margin", "reward")) else np.abs(alone[path]).max()
            atol = 1e-5 * largest
            np.testing.assert_allclose(got, alone[path], rtol=0, atol=atol, err_msg=path)
