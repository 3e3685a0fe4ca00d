"""Weak scaling: constant work per chip."""

import json
import subprocess
import sys

import pytest

from experiments import llama3_8b
from lm import planning
from lm.errors import UserError
from lm.experiment import override
from lm.parallel.mesh import Mesh

LLAMA = override(llama3_8b.experiment(), ["batch.sequences=32"])
SLICES = ["v5p-16", "v5p-128", "v5p-1024", "v5p-12288"]


def test_the_mesh_and_the_batch_grow_with_the_slice():
    rows = planning.scaling(LLAMA, SLICES, Mesh(fsdp=8), compile=False)
    meshes = ["fsdp=8", "fsdp=64", "data=2,fsdp=256", "data=24,fsdp=256"]
    assert [row.plan["mesh"] for row in rows] == meshes
    each = {row.plan["tokens_per_step"] / row.plan["chips"] for row in rows}
    assert each == {4 * 4096}
    assert rows[0].efficiency == 1
    assert "fsdp=256" in planning.scaling_text(rows)


def test_the_communication_share_grows_with_less_work_per_chip():
    def shares(*changes):
        rows = planning.scaling(override(LLAMA, changes), SLICES, Mesh(fsdp=8), compile=False)
        return [row.plan["estimate"]["link_seconds"] / row.plan["step_seconds"] for row in rows]

    assert all(a < b for a, b in zip(shares(), shares("batch.length=1024"), strict=True))
    # From 512 chips on, fsdp stays 256 and data grows, so only the cost of all-reduces grows.
    _, _, few, many = shares()
    assert few < many


def test_a_slice_must_be_a_multiple_of_the_first():
    with pytest.raises(UserError, match=r"4 devices, which is not a multiple of the 8 of 'v5p-16'"):
        planning.scaling(LLAMA, ["v5p-16", "v5p-8"], Mesh(fsdp=8), compile=False)


def test_the_weak_option_excludes_the_on_option():
    command = [sys.executable, "-m", "experiments.llama3_8b", "plan", "--weak", "v5p-64"]
    done = subprocess.run([*command, "--on", "v5p-64"], capture_output=True, text=True)
    assert done.returncode == 2 and "leave out --on" in done.stderr


def test_the_command_line_prints_the_scaling_as_json():
    command = [sys.executable, "-m", "experiments.llama3_8b", "plan", "--weak", "v5p-64,v5p-512"]
    done = subprocess.run([*command, "--estimate", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["chips"] for row in rows] == [32, 256] and rows[0]["efficiency"] == 1
