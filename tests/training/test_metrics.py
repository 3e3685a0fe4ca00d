"""metrics.jsonl stays valid and exact after a crash; optional writers run on request."""

import contextlib
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from lm import terminal
from lm.errors import UserError
from lm.training import metrics
from lm.training.metrics import Files, JsonLines, Log, read_lines, step_line, truncate_after
from lm.training.plot import _scientific, plot_loss, smooth


@given(
    steps=st.lists(st.integers(1, 30), max_size=20),
    after=st.integers(0, 31),
    cut=st.integers(0, 40),
    values=st.lists(st.floats(), min_size=20, max_size=20),
)
def test_truncation_keeps_lines_up_to_a_step_and_drops_a_partial_line(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[int],
    after: int,
    cut: int,
    values: list[float],
) -> None:
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    lines = JsonLines(path)
    for step, value in zip(steps, values, strict=False):
        lines.write({"step": step, "loss": value})
    lines.close()
    last = b'{"step": 1, "loss": 0.123456789}\n'[:cut]
    with path.open("ab") as file:
        file.write(last)
    complete = last.endswith((b"}", b"\n"))

    truncate_after(path, after)
    kept = [(s, v) for s, v in zip(steps, values, strict=False) if s <= after]
    kept += [(1, 0.123456789)] if complete and after >= 1 else []
    found = read_lines(path)
    assert [line["step"] for line in found] == [step for step, _ in kept]
    for line, (_, value) in zip(found, kept, strict=True):
        # The repr of a float parses to the same float; non-finite values become null.
        assert line["loss"] == (value if math.isfinite(value) else None)
    # Lines can be appended after truncation.
    more = JsonLines(path)
    more.write({"step": 99})
    more.close()
    assert read_lines(path)[-1] == {"step": 99}
    assert list(path.parent.iterdir()) == [path]


def test_invalid_line_in_the_middle_raises_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nspoiled\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is not a JSON object"):
        truncate_after(path, 3)
    assert path.read_text() == '{"step": 1}\nspoiled\n{"step": 3}\n'


def test_lines_are_written_to_the_file_immediately(tmp_path: Path) -> None:
    files = Files(tmp_path, after=0)
    files.step({"step": 1, "loss": 2.0})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    files.evaluation(1, [tiny_run.Result("web/loss", 1.5, None, 7)])
    assert read_lines(tmp_path / "eval.jsonl") == [
        {"step": 1, "name": "web/loss", "value": 1.5, "stderr": None, "count": 7}
    ]
    files.close()


def test_full_disk_raises_a_user_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(UserError, match=r"/dev/full cannot be written: the disk is full"):
        JsonLines("/dev/full").write({"step": 1})


def test_bucket_files_are_written_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local folder stands in for gs://, which does not support appending."""
    monkeypatch.setattr("lm.training.metrics._is_remote", lambda path: True)
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1})
    assert not path.exists()
    lines.flush()
    lines.write({"step": 2})
    lines.close()
    lines = JsonLines(path)
    lines.write({"step": 3})
    lines.close()
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"every": 0}, "log.every=0"), ({"trace": (1, 5)}, "log.trace"), ({"trace": (9, 5)}, "first")],
)
def test_invalid_log_config_raises_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Log(**fields)


@pytest.mark.parametrize(
    ("log", "module"), [(Log(tensorboard=True), "tensorboardX"), (Log(wandb="lm"), "wandb")]
)
def test_error_for_a_missing_writer_package_names_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {module}"):
        log.writers(tmp_path, name="run", after=0, steps=10, declaration={})


def test_optional_writers_get_every_step_and_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake modules record the documented calls of both libraries."""
    calls: list[Any] = []

    class Summary:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append(("open", Path(folder).name, purge_step))

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            calls.append((tag, value, step))

        def flush(self) -> None: ...

        def close(self) -> None: ...

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((values, step))

        def finish(self) -> None: ...

    def start(**fields: Any) -> Run:
        assert fields["project"] == "lm" and fields["resume"] == "allow"
        return Run()

    board, wandb = types.ModuleType("tensorboardX"), types.ModuleType("wandb")
    board.SummaryWriter, wandb.init = Summary, start
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    writers = Log(tensorboard=True, wandb="lm").writers(
        tmp_path, name="run", after=4, steps=10, declaration={}
    )
    for writer in writers:
        writer.step({"step": 5, "loss": 2.0})
        writer.evaluation(5, [tiny_run.Result("web/loss", 1.5)])
        writer.flush()
        writer.close()
    assert calls == [
        ("open", "tensorboard", 5),
        ("train/loss", 2.0, 5),
        ("eval/web/loss", 1.5, 5),
        ({"train/loss": 2.0}, 5),
        ({"eval/web/loss": 1.5}, 5),
    ]


@pytest.mark.slow
def test_profiler_trace_is_written(tmp_path: Path) -> None:
    tiny_run.run(tmp_path, 12, tiny_run.Save(every=100), log=Log(trace=(4, 6)))
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_step_line_omits_missing_values() -> None:
    values = {
        "step": 120,
        "loss": 3.21441,
        "bits_per_byte": 1.5214,
        "learning_rate": 3e-4,
        "grad_norm": 0.812,
        "tokens_per_second": 52_130.0,
        "model_flops_utilization": 0.312,
    }
    assert step_line(values, 4000, 134) == (
        "step  120/4000  loss 3.2144  1.5214 bits/byte  lr 3.00e-04  grad 0.81  "
        "52.1k tokens/s  MFU 31 %  2m 14s left"
    )
    assert "skipped" in step_line({"step": 1, "loss": math.nan, "skipped": 1.0}, 10)


def test_step_line_shows_the_metrics_of_the_objective() -> None:
    pairs = {"accuracy": 0.96875, "chosen_reward": -0.4, "margin": 0.3731, "rejected_reward": -0.8}
    line = {"step": 20, "loss": 0.514, **pairs, "weight": 8.0, "learning_rate": 2e-4}
    wanted = "step 20/40  loss 0.5140  accuracy 0.969  margin 0.373  lr 2.00e-04"
    assert step_line(line, 40) == wanted
    assert "loss 0.5140  divergence 0.510" in step_line(
        {"step": 20, "loss": 0.514, "divergence": 0.51}, 40
    )


def test_next_token_has_no_metrics_of_its_own(tiny: Any) -> None:
    """So `_COMMON` names everything that the step and the loop add."""
    for line in read_lines(tiny.folder / "metrics.jsonl"):
        assert metrics.own_metrics(line) == []


def test_plot_is_a_png_and_replaces_the_previous_one(tmp_path: Path) -> None:
    files = Files(tmp_path, after=0)
    for step in range(1, 40):
        loss = math.nan if step == 7 else 4 / step
        files.step({"step": step, "loss": loss, "learning_rate": 1e-3})
        if step % 10 == 0:
            files.evaluation(step, [tiny_run.Result("web/loss", loss, 0.1)])
    files.close()
    path = tmp_path / "plots" / "loss.png"
    for _ in range(2):
        plot_loss(tmp_path / "metrics.jsonl", tmp_path / "eval.jsonl", path, "run")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(UserError, match="no steps yet"):
        plot_loss(tmp_path / "none.jsonl", tmp_path / "none.jsonl", path, "run")


def test_plot_has_a_panel_for_each_metric_of_the_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(tmp_path, after=0)
    for step in range(1, 9):
        files.step({"step": step, "loss": 1 / step, "learning_rate": 1e-3, "chosen_reward": step})
    for name, error in (("loss", None), ("chosen_reward", 0.5), ("perplexity", 0.5)):
        files.evaluation(8, [tiny_run.Result(f"web/{name}", 2.0, error)])
    files.close()
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, *_, **__: drawn.append(self)
    )
    jsonl = (tmp_path / name for name in ("metrics.jsonl", "eval.jsonl"))
    plot_loss(*jsonl, tmp_path / "loss.png", "run")
    top, panel, right = drawn[0].axes
    assert (top.get_ylabel(), right.get_ylabel()) == ("loss", "learning rate")
    assert panel.get_title(loc="left") == "chosen reward"
    for axes in (top, panel):
        training, held_out = axes.get_lines()[1], axes.containers[0]
        assert list(training.get_xdata()) == list(range(1, 9))
        assert (list(held_out.lines[0].get_xdata()), held_out.get_label()) == ([8], "web")
    assert list(panel.containers[0].lines[1][1].get_ydata()) == [2.5], "a bar of one error"
    labels = [text.get_text() for text in top.get_legend().get_texts()]
    assert labels == ["training", "web", "learning rate"]


@pytest.mark.parametrize(
    ("rate", "text"),
    [(1.25e-3, "1.25e-3"), (1e-3, "1e-3"), (2.5e-4, "2.5e-4"), (0.0, "0"), (10.0, "1e1")],
)
def test_learning_rate_tick_labels_are_not_rounded(rate: float, text: str) -> None:
    assert _scientific(rate) == text


def test_smoothing_preserves_a_constant_and_ignores_nonfinite_values() -> None:
    np.testing.assert_allclose(smooth(np.full(200, 3.0)), 3.0)
    values = np.where(np.arange(200) % 7 == 3, np.nan, 3.0)
    smoothed = smooth(values)
    np.testing.assert_allclose(smoothed[np.isfinite(smoothed)], 3.0)
    assert np.isnan(smoothed).sum() <= 1  # near the start the window has no neighbours


def test_lines_are_valid_json(tmp_path: Path) -> None:
    lines = JsonLines(epath.Path(tmp_path) / "deep" / "metrics.jsonl")
    lines.write({"step": 1, "loss": math.inf, "name": "x"})
    lines.close()
    text = (tmp_path / "deep" / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "name": "x"}


def test_progress_bar_of_a_resumed_run_counts_all_steps_and_shows_the_time_left(
    tmp_path, monkeypatch
):
    bar, notes = [], []

    @contextlib.contextmanager
    def progress(description, total, unit, *, initial):
        bar.append((description, total, unit, initial))
        yield types.SimpleNamespace(advance=lambda *values: bar.append(values))
        bar.append("closed")

    clock = iter([100.0, 130.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(terminal, "progress", progress)
    monkeypatch.setattr(terminal, "draws_bars", lambda: True)
    monkeypatch.setattr(terminal, "note", notes.append)
    writers = Log(every=1).writers(tmp_path, name="bars", after=3, steps=7, declaration={})
    for step in (4, 5):
        for writer in writers:
            writer.step({"step": step, "loss": 1.0})
    for writer in writers:
        writer.close()
    assert bar == [("training", 7, "steps", 3), (1, None), (1, 60.0), "closed"]
    assert notes == ["step 4/7  loss 1.0000", "step 5/7  loss 1.0000  1m 00s left"]
