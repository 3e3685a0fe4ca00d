"""A run is killed with SIGKILL at random moments, also during data preparation. The same command
then finishes it with the same results as an uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_experiments import losses, texts

ROOT = Path(__file__).parents[2]
STEPS = 400

# Enough text and frequent enough saves and evaluations that each phase takes a large part of the
# time after Python's start-up.
SETTINGS = {
    "name": "killed",
    "data.path": "texts/*.txt",
    "tokenizer.vocab": "400",
    "model.vocab": "400",
    "model.dim": "32",
    "model.layers": "2",
    "model.attention": "GQA(heads=2,kv_heads=1,head_dim=16)",
    "model.ffn.hidden": "64",
    "batch.sequences": "8",
    "batch.length": "64",
    "schedule.steps": str(STEPS),
    "save.every": "10",
    "evals": "(Perplexity(every=40,batches=2),)",
}


def start(folder: Path, log: Path) -> subprocess.Popen:
    changes = (("--set", f"{path}={value}") for path, value in SETTINGS.items())
    command = [sys.executable, "-m", "experiments.text", *(w for pair in changes for w in pair)]
    with log.open("a") as said:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=said,
            stderr=subprocess.STDOUT,
        )


class Timeline(NamedTuple):
    """Seconds since the start of the process."""

    preparing: float
    prepared: float
    training: float
    done: float


def finish(folder: Path) -> Timeline:
    """Runs the command to its end. A phase that was complete before has time 0."""
    log = folder / "log.txt"
    began = time.monotonic()
    process = start(folder, log)
    seen = {}
    try:
        while process.poll() is None:
            seen.setdefault(phase(folder), time.monotonic() - began)
            assert time.monotonic() - began < 900
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.returncode == 0, log.read_text()[-3000:]
    names = ("preparing", "prepared", "training")
    return Timeline(*(seen.get(name, 0.0) for name in names), time.monotonic() - began)


def phase(folder: Path) -> str:
    """Returns the phase that a run has reached."""
    if written(folder):
        return "training"
    if (folder / "runs/killed/experiment.json").exists():
        return "prepared"
    return "preparing" if (folder / "runs/data").exists() else "starting"


def written(folder: Path) -> int:
    """Returns when metrics.jsonl was last written, or 0 while it is missing or empty."""
    metrics = folder / "runs/killed/metrics.jsonl"
    found = metrics.stat() if metrics.exists() else None
    return found.st_mtime_ns if found and found.st_size else 0


def kill(folder: Path, seconds: float, *, training: bool) -> str:
    """Starts the command and kills it `seconds` after its start, or, with `training`, after it has
    logged a step. Returns a description of the state of the run."""
    before = written(folder)
    process = start(folder, folder / "log.txt")
    while training and written(folder) == before and process.poll() is None:
        time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was complete before it could be killed"
    saved = sorted(p.name for p in (folder / "runs/killed/checkpoints").glob("*"))
    return f"killed after {seconds:.2f} s: {phase(folder)}, {saved}"


@pytest.mark.slow
def test_a_run_killed_ten_times_equals_an_uninterrupted_run(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
        (folder / "texts").symlink_to(tmp_path / "texts")
    (tmp_path / "texts").mkdir()
    for index in range(400):
        (tmp_path / f"texts/{index:03d}.txt").write_text("\n".join(texts(100, seed=index)))

    finish(undisturbed)  # fills the compilation cache for later starts
    wanted = losses(undisturbed / "runs/killed")
    assert len(wanted) == STEPS
    (undisturbed / "runs").rename(undisturbed / "first")
    timeline = finish(undisturbed)
    assert losses(undisturbed / "runs/killed") == wanted
    print(timeline)

    draw = random.Random(0)
    for _ in range(4):
        moment = draw.uniform(timeline.preparing, timeline.prepared)
        print(kill(killed, moment, training=False))
    part = (timeline.done - timeline.training) / 5  # so that six of them do not reach the end
    for _ in range(6):
        print(kill(killed, draw.uniform(0, part), training=True))
    finish(killed)

    assert losses(killed / "runs/killed") == wanted  # each step once, bit for bit
    for name in ("eval.jsonl", "tokenizer.model"):
        ours, theirs = (f / "runs/killed" / name for f in (killed, undisturbed))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert "Traceback" not in (killed / "log.txt").read_text()
    left = [p.name for p in (killed / "runs").rglob("*") if "tmp" in p.name or ".new" in p.name]
    assert not left
