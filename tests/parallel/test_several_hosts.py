"""Runs of several processes: a run resumes with any number of processes, and a failure of one
process ends all of them within seconds, with one sentence."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_conductor import SETTINGS, finish
from test_meshes import environments
from tiny_experiments import losses, write_texts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECONDS = 60  # allowed to end, on a busy machine; processes that wait for others would hang
OTHERS = ("schedule.steps", "save.every")
WITHOUT = {name: text for name, text in SETTINGS.items() if name not in OTHERS}

PROGRAM = ("-m", "experiments.text")
# A process that finds the disk full when it prepares the data.
FULL = """
import errno, runpy
from lm import data
def prepare(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")
data.prepare = prepare
runpy.run_module("experiments.text", run_name="__main__")
"""


def start(
    folder: Path,
    *words: str,
    steps: int = 4,
    changes: dict[str, str] | None = None,
    program: tuple[str, str] = PROGRAM,
    **environment: str,
) -> subprocess.Popen:
    settings = {
        **WITHOUT,
        "schedule": f"Constant(peak=1e-2,steps={steps})",
        "evals": "()",
        "save": "Save(every=4)",
        **(changes or {}),
    }
    for path, value in settings.items():
        words += ("--set", f"{path}={value}")
    return subprocess.Popen(
        [sys.executable, *program, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(*processes: subprocess.Popen) -> list[tuple[int, str]]:
    """Returns (exit code, standard error) of processes that must end within SECONDS."""
    late = time.monotonic() + SECONDS
    try:
        said = [p.communicate(timeout=max(late - time.monotonic(), 1))[1] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, err) for p, err in zip(processes, said, strict=True)]


def sentences(err: str) -> list[str]:
    """Returns the error messages, without logs of libraries and progress."""
    return [line for line in err.splitlines() if line.startswith(("python -m", "Process "))]


def test_a_run_resumes_with_a_different_number_of_processes(tmp_path):
    """Two processes, then four, then one. Each finds the folder as after a kill of the previous."""
    write_texts(tmp_path / "texts")
    changes = {"save": "Save(every=4,keep_last=3)"}
    finish(start(tmp_path, "--workdir", "alone", steps=12, changes=changes))
    words = ("--workdir", "together", "--mesh", "data=4,fsdp=2")
    saved = tmp_path / "together/small/checkpoints"
    for processes, lost in ((2, ("8", "12")), (4, ("12",))):
        finish(
            *(
                start(tmp_path, *words, steps=12, changes=changes, **one)
                for one in environments(processes)
            )
        )
        for step in lost:
            shutil.rmtree(saved / step)
    finish(start(tmp_path, "--workdir", "together", steps=12, changes=changes))
    found, wanted = (losses(tmp_path / f"{name}/small") for name in ("together", "alone"))
    assert len(found) == 12
    # The order of float32 sums differs, over twelve updates of Adam.
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("only", [0, 1])
def test_an_invalid_setting_in_one_process_ends_all(tmp_path, only):
    write_texts(tmp_path / "texts")
    processes = [
        start(tmp_path, "--mesh", "data=8", changes=wrong, **one)
        for wrong, one in zip(
            ({"model.ffn.hidden": "0"} if index == only else {} for index in range(2)),
            environments(2),
            strict=True,
        )
    ]
    for code, err in ended(*processes):
        (sentence,) = sentences(err)
        assert code == 2 and "model.ffn.hidden=0" in sentence, err
        assert "Traceback" not in err


def test_a_full_disk_in_one_process_ends_all(tmp_path):
    write_texts(tmp_path / "texts")
    processes = [
        start(tmp_path, "--mesh", "data=8", program=program, **one)
        for program, one in zip((("-c", FULL), PROGRAM), environments(2), strict=True)
    ]
    for code, err in ended(*processes):
        (sentence,) = sentences(err)
        assert code == 2 and "the disk is full" in sentence, err


def test_a_run_that_only_one_process_sees_is_refused(tmp_path):
    write_texts(tmp_path / "texts")
    finish(start(tmp_path, "--workdir", "mine"))
    processes = [
        start(tmp_path, "--mesh", "data=8", "--workdir", workdir, **one)
        for workdir, one in zip(("mine", "other"), environments(2), strict=True)
    ]
    for code, err in ended(*processes):
        (sentence,) = sentences(err)
        assert code == 2 and "a --workdir on storage that all hosts share" in sentence, err


@pytest.mark.parametrize("killed", [0, 1])
def test_killing_one_process_ends_the_other(tmp_path, killed):
    write_texts(tmp_path / "texts")
    processes = [
        start(tmp_path, "--mesh", "data=8", steps=1_000_000, **one) for one in environments(2)
    ]
    metrics = tmp_path / "runs/small/metrics.jsonl"
    late = time.monotonic() + 300
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < late and all(p.poll() is None for p in processes)
        time.sleep(0.2)
    processes[killed].send_signal(signal.SIGKILL)
    code, err = ended(*processes)[1 - killed]
    assert code != 0 and sentences(err)[-1].startswith(f"Process {killed} was killed or lost"), err
