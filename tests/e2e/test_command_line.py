"""Behavior that needs separate processes: `python -m`, real signals, pipes and stray output."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_experiments import losses, write_texts

ROOT = Path(__file__).parents[2]

SMALL = {
    "name": "small",
    "tokenizer.vocab": "320",
    "model.vocab": "320",
    "model.dim": "16",
    "model.layers": "1",
    "model.attention": "GQA(heads=2,kv_heads=1,head_dim=8)",
    "model.ffn.hidden": "32",
    "batch.sequences": "4",
    "batch.length": "32",
    "save.every": "5",
    "evals": "(Perplexity(every=5),)",
    "log.every": "1",
}


def settings(folder: Path, steps: int, **more: str) -> list[str]:
    """Returns options that make experiments.text a tiny experiment on generated texts."""
    changes = SMALL | {"data.path": str(folder / "texts/*.txt"), "schedule.steps": str(steps)}
    changes |= more
    pairs = (("--set", f"{path}={value}") for path, value in changes.items())
    return [word for pair in pairs for word in pair]


def python(folder: Path, *words: str) -> subprocess.Popen:
    """Starts `python -m words` in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.fixture
def folder(tmp_path):
    write_texts(tmp_path / "texts")
    return tmp_path


def test_an_invalid_setting_prints_one_line_and_creates_no_run(folder):
    code, out, err = finish(python(folder, "experiments.text", "--set", "model.layer=2"))
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("python -m experiments.text: ")
    assert "Did you mean 'model.layers'?" in err
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_training_on_text_and_generating_text(folder):
    code, out, err = finish(python(folder, "experiments.text", *settings(folder, 10)))
    assert code == 0, err
    assert "Traceback" not in err and "Warning" not in err
    assert "python -m lm generate runs/small" in out
    (longer,) = (line for line in out.splitlines() if "-m experiments.text" in line)
    assert "--set model.dim=16" in longer
    assert longer.endswith(" --set schedule.steps=20  # a new, longer run")
    assert len(losses(folder / "runs/small")) == 10

    words = ("lm", "generate", "runs/small", "--prompt", "the tree", "--max-tokens", "8")
    code, out, err = finish(python(folder, *words, "--json"))
    assert code == 0, err
    assert json.loads(out)["step"] == 10
    assert err == ""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_resumes(folder, number, code):
    """Sends a signal from another process while the run logs its steps."""
    command = ("experiments.text", *settings(folder, 2_000, **{"save.every": "1000"}))
    process = python(folder, *command)
    metrics = folder / "runs/small/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    given, _, err = finish(process)
    assert given == code, err
    assert "Traceback" not in err
    stopped = len(losses(folder / "runs/small"))
    assert f"Stopped and saved at step {stopped}" in err
    assert (folder / "runs/small/checkpoints" / str(stopped)).is_dir()

    again = python(folder, *command)
    while metrics.read_text().count("\n") < stopped + 3:
        assert again.poll() is None and time.monotonic() < deadline, again.communicate()
        time.sleep(0.02)
    again.send_signal(number)
    given, _, err = finish(again)
    assert given == code, err
    assert f"from step {stopped} of 2000" in err
    assert len(losses(folder / "runs/small")) > stopped


@pytest.mark.slow
def test_a_damaged_checkpoint_prints_only_one_line(folder):
    """Threads that fail along with the restore print nothing."""
    code, _, err = finish(python(folder, "experiments.text", *settings(folder, 5)))
    assert code == 0, err
    saved = folder / "runs/small/checkpoints/5"
    for path in saved.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-100])
    code, out, err = finish(python(folder, "lm", "generate", "runs/small", "--prompt", "the"))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert "checkpoints/5 cannot be read" in err


def test_a_closed_pipe_is_not_an_error(folder):
    """`... show | head -1` ends without an error message."""
    process = python(folder, "experiments.stdlib", "show")
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=300)
    assert "Traceback" not in err and "Exception" not in err, err


@pytest.fixture
def disk(tmp_path):
    """A small disk (tmpfs); `disk(size)` resizes it and returns its path."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not mount("size=4k"):
        pytest.skip("only root may mount a disk")

    def resize(size: str) -> Path:
        assert mount(f"remount,size={size}")
        return place

    yield resize
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_loses_no_steps(folder, disk):
    """The error is one sentence at any point of the run; with more space the same command finishes
    the run."""
    command = ("experiments.text", *settings(folder, 10))
    code, _, err = finish(python(folder, *command))
    assert code == 0, err
    wanted = losses(folder / "runs/small")
    for size in ("16k", "40k", "60k", "120k", "200k", "300k", "400k", "430k"):
        where = disk(size)
        code, _, err = finish(python(folder, *command, "--workdir", str(where)))
        print(size, code, err.splitlines()[-1])
        if code == 0:
            break
        assert code == 2, err
        assert "Traceback" not in err and "the disk" in err.splitlines()[-1].lower(), err
        assert "full" in err.splitlines()[-1]
    code, _, err = finish(python(folder, *command, "--workdir", str(disk("20m"))))
    assert code == 0, err
    assert losses(where / "small") == wanted
