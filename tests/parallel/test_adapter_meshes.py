"""Adapters, quantized weights and the objectives of pairs compute on every mesh what one device
computes (see test_meshes.py for the tolerances)."""

from pathlib import Path

import numpy as np
import pytest
from test_meshes import ALONE, EIGHT, ONE_STEP, results, start, wait

WORKER = Path(__file__).with_name("adapter_runs.py")
MIXED = "data=2,fsdp=2,tensor=2"
SPLIT = ("fsdp=8", "tensor=8", MIXED, "pipe=2,fsdp=2,tensor=2", "context=2,fsdp=2,tensor=2")
RUNS = ("lora", "qlora", "dpo", "prefix", "bottleneck", "on_policy", "reward")
# The gradient of one step, fed back into itself twice.
THREE_STEPS = 3e-5


def trained(run, meshes, folder):
    wait(start(folder, run, meshes, WORKER, **EIGHT))
    return results(folder, meshes)


def agree(run, meshes, folder):
    numbers = trained(run, (ALONE, *meshes), folder)
    alone = numbers[ALONE]
    assert np.any(alone["lines"][:, 1] > 1e-3), "the adapter has no gradient"
    for mesh in meshes:
        assert numbers[mesh].keys() == alone.keys()
        np.testing.assert_allclose(numbers[mesh]["lines"][0], alone["lines"][0], rtol=ONE_STEP)
        for name, x in alone.items():
            limit = ONE_STEP if name.startswith("gradient/") else THREE_STEPS
            error = np.abs(numbers[mesh][name] - x).max()
            assert error <= limit * np.abs(x).max() + 1e-9, (mesh, name)


def test_one_device_equals_a_mesh(tmp_path):
    """DPO of a quantized model with a LoRA."""
    agree("dpo", (MIXED,), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_one_device_equals_every_mesh(run, tmp_path):
    agree(run, SPLIT, tmp_path)
