"""What the READMEs say is so: commands parse, paths exist, code runs, and nothing is left out of
the maps."""

import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_experiments

import lm.main
from lm import run, runs
from lm.commands import bench
from lm.experiment import from_json, to_json
from lm.planning import show

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted(p for p in (ROOT / "experiments").glob("*.py") if p.stem != "__init__")
READMES = [ROOT / "README.md", ROOT / "experiments" / "README.md", ROOT / "experiments" / "LOG.md"]
READMES += [ROOT / "lm" / room / "README.md" for room in ("data", "hf")]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# A path that some machine has and others do not; /data stands for yours.
SOMEWHERE = re.compile(r"(?<![\w.$~/-])/(home|Users|root|work|mnt|tmp|var)/")


def fences(path: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(path.read_text()) if kind == language]


def documented() -> Iterator[tuple[str, str]]:
    """(file, text with commands): the READMEs, and the docstring of each experiment."""
    for path in READMES:
        yield str(path.relative_to(ROOT)), path.read_text()
    for path in EXPERIMENTS:
        yield str(path.relative_to(ROOT)), path.read_text()


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """(file, module, arguments) of every `python -m MODULE ...`, but for examples of output and of
    files."""
    for file, text in documented():
        text = re.sub(r"^```(text|python)\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for found in re.finditer(r"python3? -m [^`\n]+", text):
            words = _words(found.group())
            if "NAME" not in words[0]:
                yield file, words[0], words[1:]


def _words(command: str) -> list[str]:
    """The words after `python -m`, also of a command inside a quoted one."""
    try:
        words = shlex.split(command)[2:]
    except ValueError:  # the closing quote of the outer command
        words = shlex.split(command.rstrip()[:-1])[2:]
    return words[: words.index("&&")] if "&&" in words else words


def _id(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


@pytest.mark.parametrize(("file", "module", "arguments"), list(commands()), ids=_id)
def test_a_documented_command_parses(file, module, arguments, monkeypatch):
    assert importlib.util.find_spec(module) is not None
    called = []

    def call(*given, **options):
        called.append(given)
        return types.SimpleNamespace(stopped=None)

    monkeypatch.setattr(lm.main.distributed, "initialize", lambda: None)
    monkeypatch.setattr(run, "train", call)
    monkeypatch.setattr(show, "facts", call)
    monkeypatch.setattr(show, "text", lambda shown: "")
    monkeypatch.setattr(lm.main.json, "dumps", lambda shown: "")
    for verb in ("_generate", "_eval", "_import", "_export"):
        monkeypatch.setattr(lm.main, verb, call)
    monkeypatch.setattr(lm.main, "_plan", call)
    monkeypatch.setattr(bench, "step", call)
    monkeypatch.setattr(bench, "reading", call)
    monkeypatch.setattr(bench, "reading_text", lambda measured: "")
    monkeypatch.setattr(bench, "text", lambda measured: "")
    if module == "lm":
        lm.main.lm_main(arguments)
        assert called
    elif module.startswith("experiments."):
        declare = importlib.import_module(module).experiment
        lm.main.main(declare, arguments)
        assert called


def test_commands_are_found():
    found = {(module, *arguments) for _, module, arguments in commands()}
    assert ("experiments.stdlib",) in found
    assert ("lm", "eval", "runs/stdlib") in found
    assert any("gs://my-bucket/runs" in arguments for arguments in found)  # inside gcloud's quotes


def test_the_readme_opens_with_the_two_commands():
    first, second = fences(ROOT / "README.md", "sh")[:2]
    assert first == "pip install -e . && python -m experiments.stdlib\n"
    assert second == 'pip install -e ".[test]" && pytest\n'
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(part in ci for part in ("-e .\n", "-m experiments.stdlib", '-e ".[test]"', "pytest"))


def python_fences() -> list[tuple[str, str]]:
    return [(path.name, body) for path in READMES for body in fences(path, "python")]


@pytest.mark.parametrize("body", [body for _, body in python_fences()])
def test_code_in_the_docs_is_code(body, tmp_path, monkeypatch):
    compile(body, "README.md", "exec")
    monkeypatch.setattr(runs, "load_declaration", lambda folder: tiny_experiments.experiment())
    if "lm.train" in body:
        return  # the notebook does that
    file = tmp_path / "readme.py"
    file.write_text(body)
    names = runpy.run_path(str(file), run_name="readme")
    if "experiment" not in names:
        return
    declared = names["experiment"]()
    assert from_json(json.loads(json.dumps(to_json(declared)))) == declared
    for place in declared.places.values():
        declared.check_place(place)


def test_the_readme_declares_an_experiment():
    assert any("def experiment()" in body for _, body in python_fences())


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_resolve(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in link or (path.parent / link).exists(), link
    pattern = r"`((?:lm|experiments|tests|kernels_pallas|\.ci)/[\w./-]+)`"
    for named in re.findall(pattern, text):
        assert (ROOT / named).exists(), named


def test_every_experiment_is_in_the_index():
    index = (ROOT / "experiments" / "README.md").read_text()
    notebooks = (ROOT / "experiments" / "notebooks").glob("*.ipynb")
    wanted = [f"({path.name})" for path in EXPERIMENTS]
    wanted += [f"(notebooks/{path.name})" for path in notebooks]
    assert [each for each in wanted if each not in index] == []


def test_the_map_names_every_room():
    left = re.findall(r"^    ([a-z_]+(?:, [a-z_]+)*)(?:  |$)", lm.__doc__, re.MULTILINE)
    on_map = {name for names in left for name in names.split(", ")}
    rooms = {path.stem for path in (ROOT / "lm").glob("[a-z]*")}
    assert on_map == rooms


def test_a_room_names_every_module():
    missing = []
    for path in (ROOT / "lm").glob("*/[a-z]*.py"):
        room = (path.parent / "__init__.py").read_text()
        if not re.search(rf"\b{path.stem}\b", room):
            missing.append(str(path.relative_to(ROOT)))
    assert missing == []


def test_no_file_names_a_path_of_one_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if not path.is_file():  # deleted, and not yet committed
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if SOMEWHERE.search(line):
                found.append(f"{name}:{number}: {line.strip()}")
    assert found == []
