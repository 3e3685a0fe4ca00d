"""A complete run from text in two processes, compared with a run on one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import virtual_devices
from tiny_experiments import losses, write_texts

ROOT = Path(__file__).parents[2]

SETTINGS = {
    "name": "small",
    "data.path": "texts/*.txt",
    "tokenizer.vocab": "320",
    "model.vocab": "320",
    "model.dim": "16",
    "model.layers": "1",
    "model.attention": "GQA(heads=2,kv_heads=1,head_dim=8)",
    "model.ffn.hidden": "32",
    "batch.sequences": "8",
    "batch.length": "32",
    "schedule.steps": "8",
    "save.every": "4",
    "evals": "(Perplexity(every=4),)",
    "sample": "the",
}


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen:
    changes = (("--set", f"{path}={value}") for path, value in SETTINGS.items())
    words = (*words, *(word for pair in changes for word in pair))
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.text", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen) -> list[tuple[str, str]]:
    try:
        said = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err[-3000:]
    return said


def two_processes(folder: Path, *words: str) -> list[tuple[str, str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = {
        "XLA_FLAGS": virtual_devices.flags(4),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    return finish(
        *(start(folder, *words, **shared, JAX_PROCESS_ID=str(index)) for index in range(2))
    )


@pytest.mark.slow
def test_two_processes_train_like_one_device(tmp_path):
    write_texts(tmp_path / "texts")
    finish(start(tmp_path, "--workdir", "alone"))
    mesh = ("--mesh", "data=2,fsdp=2,tensor=2", "--workdir", "together")
    (out, _), (other_out, other_err) = two_processes(tmp_path, *mesh)

    alone, together = tmp_path / "alone/small", tmp_path / "together/small"
    # The order of float32 sums differs, over eight updates of Adam.
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    ours, theirs = (
        [json.loads(line) for line in (f / "eval.jsonl").read_text().splitlines()]
        for f in (together, alone)
    )
    for mine, its in zip(ours, theirs, strict=True):
        assert all(mine[key] == its[key] for key in ("step", "name", "count"))
        assert mine["value"] == pytest.approx(its["value"], rel=1e-4)
    assert "Trained small to step 8" in out and "Sample" in out
    assert other_out == ""  # only the main process prints
    assert "step" not in other_err

    (out, _), (other_out, _) = two_processes(tmp_path, *mesh)
    assert "is complete at step 8" in out and other_out == ""
    # Hardware is not part of a run's identity: on one device it is the same, complete run.
    ((out, _),) = finish(start(tmp_path, "--workdir", "together"))
    assert "is complete at step 8" in out
