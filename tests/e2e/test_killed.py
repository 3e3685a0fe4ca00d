"""SIGKILL at random moments, data preparation included: the same command finishes the run as if
nothing had happened."""

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

# Enough text, and steps that save and evaluate often enough, for each phase to take a good part of
# the time that is not Python's start.
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
    """Runs the command to its end; a phase that was over before begins at 0."""
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
    """How far a run has come."""
    if written(folder):
        return "training"
    if (folder / "runs/killed/experiment.json").exists():
        return "prepared"
    return "preparing" if (folder / "runs/data").exists() else "starting"


def written(folder: Path) -> int:
    """When metrics.jsonl was last written; 0 while it holds nothing."""
    metrics = folder / "runs/killed/metrics.jsonl"
    found = metrics.stat() if metrics.exists() else None
    return found.st_mtime_ns if found and found.st_size else 0


def kill(folder: Path, seconds: float, *, training: bool) -> str:
    """Starts the command and kills it so long after its start, or after it has taken up training;
    returns where that was."""
    before = written(folder)
    process = start(folder, folder / "log.txt")
    while training and written(folder) == before and process.poll() is None:
        time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was complete before it could be killed"
    saved = sorted(p.name for p in (folder / "runs/killed/checkpoints").glob("*"))
    return f"killed after {seconds:.2f} s: {phase(folder)}, {saved}"


@pytest.mark.slow
def test_killed_ten_times_it_finishes_as_if_undisturbed(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
        (folder / "texts").symlink_to(tmp_path / "texts")
    (tmp_path / "texts").mkdir()
    for index in range(400):
        (tmp_path / f"texts/{index:03d}.txt").write_text("\n".join(texts(100, seed=index)))

    finish(undisturbed)  # compiles, which later starts find done
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
    part = (timeline.done - timeline.training) / 5  # so that six of them do not get to the end
    for _ in range(6):
        print(kill(killed, draw.uniform(0, part), training=True))
    finish(killed)

    assert losses(killed / "runs/killed") == wanted  # each step once, to the bit
    for name in ("eval.jsonl", "tokenizer.model"):
        ours, theirs = (f / "runs/killed" / name for f in (killed, undisturbed))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert "Traceback" not in (killed / "log.txt").read_text()
    left = [p.name for p in (killed / "runs").rglob("*") if "tmp" in p.name or ".new" in p.name]
    assert not left
