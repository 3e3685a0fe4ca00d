"""The engine gives the same tokens on one device and on every mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tolerance
import virtual_devices

HERE = Path(__file__).parent
ATOL = tolerance.of_chain(1.0, *[64 * 4.0**2] * 4)  # of log-probabilities


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "meshes"),
    [
        ("dense", ["tensor=8", "fsdp=8", "data=2 fsdp=2 tensor=2"]),
        ("experts", ["expert=4", "data=2 fsdp=2 tensor=2", "expert=2 tensor=2"]),
    ],
)
def test_one_device_equals_every_mesh(name, meshes):
    """With fewer key/value heads than devices, a window, cached prefixes and preemption."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, str(HERE / "engine_on_meshes.py"), name, "", *meshes],
        env={**os.environ, "XLA_FLAGS": virtual_devices.flags(8), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    wanted = found.pop("")
    assert list(found) == meshes
    assert sum(cached for *_, cached in wanted) > 0
    for outputs in found.values():
        for (tokens, logprobs, cached), want in zip(outputs, wanted, strict=True):
            assert (tokens, cached) == (want[0], want[2])
            np.testing.assert_allclose(logprobs, want[1], rtol=0, atol=ATOL)
