"""Every mesh computes what one device computes, and resumes from checkpoints of any other mesh.

mesh_runs.py runs the training in separate processes with 8 virtual CPU devices; this file compares
the results. Tolerances are for float32: a sum in a different order differs by a few units of 6e-8.
In gradients through the layers the error stays below 1e-5 of the largest element. Over twenty
updates it feeds back into itself, hence 1e-4.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import virtual_devices

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("mesh_runs.py")

ALONE = "data=1"
DENSE = (ALONE, "data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2")
MOE = (ALONE, "expert=4", "fsdp=2,expert=2,tensor=2")
TWO_PROCESSES = ("data=8", "data=2,fsdp=2,tensor=2")

# XLA's CPU executor starts independent collectives in any order, and each blocks its device, so two
# devices may deadlock in different collectives. Running them in program order avoids this.
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
EIGHT = {"XLA_FLAGS": virtual_devices.flags(8, IN_ORDER)}

ONE_STEP, TWENTY_STEPS = 1e-5, 1e-4

Numbers = Mapping[str, np.ndarray]


def start(
    folder: Path, run: str, meshes: Sequence[str], worker: Path = WORKER, **environment: str
) -> subprocess.Popen:
    command = [sys.executable, str(worker), str(folder), run, *meshes]
    pipe = subprocess.PIPE
    environment = {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def wait(*processes: subprocess.Popen) -> None:
    try:
        for process in processes:
            said, _ = process.communicate(timeout=1800)
            assert process.returncode == 0, said[-4000:]
    finally:
        for process in processes:
            process.kill()


def results(folder: Path, meshes: Sequence[str]) -> dict[str, Numbers]:
    return {mesh: dict(np.load(folder / f"{mesh}.npz")) for mesh in meshes}


def on_virtual_devices(folder: Path, run: str, meshes: Sequence[str]) -> dict[str, Numbers]:
    wait(start(folder, run, meshes, **EIGHT))
    return results(folder, meshes)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("dense")


@pytest.fixture(scope="module")
def dense(dense_folder) -> dict[str, Numbers]:
    return on_virtual_devices(dense_folder, "dense", DENSE)


@pytest.fixture(scope="module", params=["dropless", "capacity"])
def experts(request, tmp_path_factory) -> dict[str, Numbers]:
    return on_virtual_devices(tmp_path_factory.mktemp(request.param), request.param, MOE)


@pytest.fixture(scope="module")
def two_processes(dense, dense_folder) -> dict[str, Numbers]:
    """Two processes with four devices each, which find the checkpoints of single-process runs."""
    folder = dense_folder / "two"
    folder.mkdir()
    for saved in dense_folder.glob("saved-*"):
        if saved.name.removeprefix("saved-") not in TWO_PROCESSES:
            (folder / saved.name).symlink_to(saved)
    wait(*(start(folder, "dense", TWO_PROCESSES, **one) for one in environments(processes=2)))
    return results(folder, TWO_PROCESSES)


def environments(processes: int) -> list[dict[str, str]]:
    """Returns the environment variables of processes that share 8 virtual devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = {
        "XLA_FLAGS": virtual_devices.flags(8 // processes, IN_ORDER),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(processes),
    }
    return [shared | {"JAX_PROCESS_ID": str(index)} for index in range(processes)]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, relative to the largest element."""
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def differences(mesh: Numbers, alone: Numbers, what: str) -> dict[str, float]:
    return {k: difference(mesh[k], x) for k, x in alone.items() if k.startswith(f"{what}/")}


def check_agreement(mesh: Numbers, alone: Numbers) -> None:
    """Prints the largest differences (pytest -s) and asserts their bounds."""
    for path, x in alone.items():
        if path.startswith("initial/"):
            # The random bits are the same. XLA's vector and scalar code for the polynomial that
            # turns them into normals rounds the last bit differently.
            np.testing.assert_allclose(mesh[path], x, rtol=1e-6, err_msg=path)
    losses, norms = (np.abs(mesh[k] / alone[k] - 1) for k in ("loss", "grad_norm"))
    gradients, params = (differences(mesh, alone, k) for k in ("gradient", "params"))
    print(
        f"first loss {losses[0]:.1e}, gradient norm {norms[0]:.1e}, "
        f"gradients {max(gradients.values()):.1e}, parameters {max(params.values()):.1e}; "
        f"losses of {len(losses)} steps {losses.max():.1e}, gradient norms {norms.max():.1e}"
    )
    assert not mesh["skipped"].any()
    assert losses[0] <= ONE_STEP
    assert norms[0] <= ONE_STEP
    assert max(gradients.values()) <= ONE_STEP, gradients
    assert max(params.values()) <= ONE_STEP, params
    assert losses.max() <= TWENTY_STEPS
    assert norms.max() <= TWENTY_STEPS


def check_restored(mesh: Numbers, all_meshes: Mapping[str, Numbers], name: str) -> None:
    """Checkpoints of all meshes are restored bit for bit, and the losses continue unchanged."""
    origins = [k.removeprefix("continued ") for k in mesh if k.startswith("continued ")]
    assert origins
    for origin in origins:
        saved = all_meshes[origin]
        for path, x in saved.items():
            if path.startswith("saved/"):
                restored = mesh[f"restored {origin}/{path.removeprefix('saved/')}"]
                np.testing.assert_array_equal(restored, x, f"{path} of {origin}")
        losses = mesh[f"continued {origin}"]
        uninterrupted = saved["loss"][-len(losses) :]
        assert len(losses) == 20
        if origin == name:
            np.testing.assert_array_equal(losses, uninterrupted)
        else:
            np.testing.assert_allclose(losses, uninterrupted, rtol=TWENTY_STEPS, err_msg=origin)


def test_losses_and_weights_change_during_training(dense):
    """Otherwise, agreement between meshes would mean little."""
    losses = dense[ALONE]["loss"]
    assert len(set(losses)) == len(losses)
    moved = differences(
        {k.replace("saved/", "initial/"): x for k, x in dense[ALONE].items()},
        dense[ALONE],
        "initial",
    )
    assert min(moved.values()) > 10 * ONE_STEP, moved


@pytest.mark.parametrize("mesh", DENSE[1:])
def test_dense_agrees_with_one_device(dense, mesh):
    check_agreement(dense[mesh], dense[ALONE])


@pytest.mark.parametrize("mesh", DENSE)
def test_dense_resumes_from_other_meshes(dense, mesh):
    check_restored(dense[mesh], dense, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MOE[1:])
def test_moe_agrees_with_one_device(experts, mesh):
    check_agreement(experts[mesh], experts[ALONE])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MOE)
def test_moe_resumes_from_other_meshes(experts, mesh):
    check_restored(experts[mesh], experts, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", TWO_PROCESSES)
def test_two_processes_agree_with_one_device(two_processes, dense, mesh):
    check_agreement(two_processes[mesh], dense[ALONE])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", TWO_PROCESSES)
def test_two_processes_resume_from_one_process(two_processes, dense, mesh):
    """From their own checkpoints, and those of one process with one device or eight."""
    check_restored(two_processes[mesh], dense | two_processes, mesh)
