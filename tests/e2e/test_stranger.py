"""An experiment file outside of lm with custom components (stranger.py) works like a built-in one:
training, resuming after a kill, show, --set, loading, and errors that name the component."""

import importlib.machinery
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import stranger
from tiny_experiments import losses

import lm
from lm import evals, main, model, objectives, serialization
from lm.errors import UserError
from lm.exchange import export_run
from lm.experiment import from_json, override, to_json
from lm.runs import load_declaration

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).parent / "stranger.py"
OWN = {
    "data": "Counting",
    "objective": "Focal",
    "optimizer": "Adan",
    "model.ffn": "SineFFN",
    "evals.0": "OutputNorm",
}


def at(content, path: str):
    """Returns the JSON value at a path of the declaration."""
    for key in path.split("."):
        content = content[int(key)] if isinstance(content, list) else content[key]
    return content


def test_the_file_is_short_and_its_classes_are_serialized_by_name():
    assert len(FILE.read_text().splitlines()) < 80
    declared = stranger.declare()
    for path, name in OWN.items():
        assert at(to_json(declared), path)["type"] == f"stranger.{name}"


def test_overrides_and_json_support_custom_components():
    declared = stranger.declare()
    own = ["objective.gamma=2", "model.ffn.hidden=48", "data.count=30", "evals.0.pause=1e-3"]
    changed = override(declared, own)
    assert (changed.objective, changed.model.ffn) == (
        stranger.Focal(gamma=2.0),
        stranger.SineFFN(hidden=48),
    )
    assert changed.data.count == 30 and changed.evals[0].pause == 1e-3
    assert changed.name == "stranger+data.count=30+model.ffn.hidden=48+objective.gamma=2.0"
    assert from_json(json.loads(json.dumps(to_json(changed)))) == changed
    # Replace whole objects: custom by built-in, and built-in by custom.
    whole = override(changed, ["objective=NextToken()", "model.ffn=SwiGLU(hidden=8)"])
    assert whole.objective == objectives.NextToken() and whole.model.ffn == model.SwiGLU(hidden=8)
    assert override(whole, ["model.ffn=SineFFN(hidden=8)"]).model.ffn == stranger.SineFFN(hidden=8)
    for change, words in {
        "objective.gama=2": r"objective\.gama is not known\. Did you mean 'objective\.gamma'",
        "objective.gamma=x": r"objective\.gamma=x must be a number",
        "model.ffn=SineFF(hidden=8)": r"SineFF\(\.\.\.\) is not known there.*SineFFN",
    }.items():
        with pytest.raises(UserError, match=words):
            override(declared, [change])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, run) of the experiment, trained in this process."""
    workdir = tmp_path_factory.mktemp("stranger")
    return workdir, lm.train(stranger.declare(), workdir=workdir)


def test_a_custom_experiment_trains_and_loads(trained):
    workdir, _ = trained
    folder = workdir / "stranger"
    values = losses(folder)
    assert len(values) == 16 and values[-1] < 0.8 * values[0]
    lines = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["name"] == "norm"] == [*range(2, 17, 2)]
    loaded = lm.load(folder)
    assert loaded.experiment == load_declaration(folder) == stranger.declare()
    assert type(loaded.model.blocks[0].ffn) is stranger.Sine
    assert isinstance(loaded.generate("0 1 4", max_tokens=4), str)
    results = loaded.evaluate()
    assert all(isinstance(result, evals.Result) for result in results) and len(results) == 3


def test_the_export_error_names_the_custom_block(trained, tmp_path):
    workdir, _ = trained
    with pytest.raises(UserError, match=r"model\.ffn=SineFFN\(hidden=32\) of layer 0"):
        export_run(workdir / "stranger", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_show_prints_custom_components(capsys):
    main.main(stranger.declare, ["show", "--set", "objective.gamma=3"])
    shown = capsys.readouterr().out
    for name in OWN.values():
        assert name in shown
    assert "gamma: 3.0" in shown


@dataclass(frozen=True, kw_only=True)
class WithFunction(stranger.Focal):
    function: Callable = abs


@dataclass(frozen=True, kw_only=True)
class WithDict(stranger.SineFFN):
    sizes: dict[str, int] = field(default_factory=lambda: {"a": 1})


class Outer:
    @dataclass(frozen=True, kw_only=True)
    class Inner(stranger.Focal):
        pass


def test_components_that_cannot_be_read_back_are_refused_before_writing(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Local(stranger.Focal):
        pass

    for objective, words in {
        Local(): "objective is of class Local.*inside a function or class",
        Outer.Inner(): "objective is of class Inner.*inside a function or class",
        WithFunction(): r"objective\.function is of type builtin_function_or_method",
    }.items():
        with pytest.raises(UserError, match=words):
            lm.train(replace(stranger.declare(), objective=objective), workdir=tmp_path)
    with pytest.raises(UserError, match="not hashable.*'dict'"):
        replace(stranger.declare().model, ffn=WithDict(hidden=8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("started", ["mine", "package.mine", "package"])
def test_a_class_is_named_by_the_module_that_runs_as_main(started, tmp_path, monkeypatch):
    """`python -m MODULE` runs MODULE as __main__. Other processes import the class from MODULE, or
    for a package from its __main__.py."""
    name = {"package": "package.__main__"}.get(started, started)
    path = tmp_path / f"{name.replace('.', '/')}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "from dataclasses import dataclass\nfrom lm import model\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass SinGLU(model.SwiGLU):\n    pass\n"
    )
    running = types.ModuleType("__main__")
    exec(compile(path.read_text(), str(path), "exec"), vars(running))
    running.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.syspath_prepend(tmp_path)
    declared = replace(stranger.declare().model, ffn=running.SinGLU(hidden=8))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "__main__", running)
        content = serialization.to_json(declared)
        serialization.check_readable(declared)
        assert serialization.from_json(content) == declared
    assert content["ffn"]["type"] == f"{name}.SinGLU"
    read = serialization.from_json(content)
    assert serialization.to_json(read) == content
    for module in (name, name.partition(".")[0]):
        sys.modules.pop(module, None)


# Tests in separate processes


def start(folder: Path, *words: str) -> subprocess.Popen:
    """Starts `python -m WORDS` in a folder that holds stranger.py."""
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(folder: Path, *words: str, code: int = 0) -> str:
    process = start(folder, *words)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output
    assert "Traceback" not in output
    return output


@pytest.mark.slow
def test_a_killed_run_resumes_and_loads_in_other_commands(trained, tmp_path):
    (tmp_path / "stranger.py").write_text(FILE.read_text())
    # The pause leaves time for the kill between a checkpoint and the end.
    train = ("stranger", "--set", "save.every=4", "--set", "evals.0.pause=0.5")
    process, folder = start(tmp_path, *train), tmp_path / "runs/stranger"
    while not (folder / "checkpoints/4").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stdout.read()
    assert not (folder / "checkpoints/16").exists()

    facts = json.loads((folder / "experiment.json").read_text())["experiment"]
    for path, name in OWN.items():
        assert at(facts, path)["type"] == f"stranger.{name}"
    resumed = said(tmp_path, *train)
    assert "Resuming" in resumed and "of 16" in resumed
    assert losses(folder) == losses(trained[0] / "stranger")
    assert "complete" in said(tmp_path, *train).lower()

    assert "0 1 4" in said(
        tmp_path, "lm", "generate", "runs/stranger", "--prompt", "0 1 4", "--max-tokens", "4"
    )
    assert "bits_per_byte" in said(tmp_path, "lm", "eval", "runs/stranger")
    assert "gamma: 2.0" in said(tmp_path, "stranger", "show", "--set", "objective.gamma=2")
    refused = said(tmp_path, "lm", "export", "runs/stranger", "exported", code=2)
    assert "model.ffn=SineFFN(hidden=32)" in refused and len(refused.splitlines()) == 1

    # From another folder, where the module can't be imported.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    refused = said(elsewhere, "lm", "eval", str(folder), code=2)
    assert "stranger" in refused and "run the command from the folder that holds it" in refused
