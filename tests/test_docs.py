"""Checks the documentation: commands parse, links resolve, code runs, module lists are complete."""

import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import experiment_files
import pytest
import tiny_experiments
from test_layering import ORDER

import lm.main
from lm import run, runs, terminal
from lm.commands import (
    chat,
    eval,
    export,
    generate,
    import_,
    measure,
    measure_serving,
    plan,
    serve,
    train,
)
from lm.experiment import from_json, override, to_json
from lm.parallel import distributed
from lm.planning import show

ROOT = Path(__file__).parent.parent
FOLDERS = ("lm", "experiments", "kernels_pallas")
READMES = [ROOT / "README.md", *sorted(p for name in FOLDERS for p in (ROOT / name).rglob("*.md"))]
# Standard terms that users of other frameworks search for in the README.
TERMS = (
    *("data parallelism", "tensor, pipeline, context and expert parallelism", "fsdp", "zero-3"),
    *("gradient accumulation", "activation checkpointing", "remat", "mixed precision", "bf16"),
    *("loss scaling", "kv cache", "auxiliary loss", "throughput", "validation", "checkpoints"),
    *("exact resume", "fine-tuning", "freezing weights", "tpu pods", "flax modules", "pallas"),
    *("hugging face", "tokenizers", "learning-rate schedules", "mixture of experts"),
)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Absolute paths specific to one machine. The documentation uses /data for the user's own paths.
LOCAL_PATH = re.compile(r"(?<![\w.$~/-])/(home|Users|root|work|mnt|tmp|var)/")


def fences(path: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(path.read_text()) if kind == language]


def documented() -> Iterator[tuple[str, str]]:
    """Yields (file, text) of each documentation page and experiment file."""
    for path in READMES:
        yield str(path.relative_to(ROOT)), path.read_text()
    for path in experiment_files.PATHS:
        yield str(path.relative_to(ROOT)), path.read_text()


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """Yields (file, module, arguments) of `python -m` commands outside text and python blocks."""
    for file, text in documented():
        text = re.sub(r"^```(text|python)\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for command in re.findall(r"python3? -m [^`\n]+", text):
            words = _words(command)
            if "NAME" not in words[0]:
                yield file, words[0], words[1:]


def _words(command: str) -> list[str]:
    """Splits the words after `python -m`, also of a command nested in a quoted command."""
    try:
        words = shlex.split(command)[2:]
    except ValueError:  # the closing quote of the outer command is unmatched
        words = shlex.split(command.rstrip()[:-1])[2:]
    return words[: words.index("&&")] if "&&" in words else words


def _id(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


@pytest.mark.parametrize(("file", "module", "arguments"), list(commands()), ids=_id)
def test_documented_command_parses(file, module, arguments, monkeypatch):
    assert importlib.util.find_spec(module) is not None
    called = []

    def call(*arguments, **options):
        called.append(arguments)
        return types.SimpleNamespace(stopped=None)

    monkeypatch.setattr(distributed, "initialize", lambda: None)
    monkeypatch.setattr(run, "train", call)
    monkeypatch.setattr(train, "_folders", lambda *_: [])  # folders in a bucket need gcsfs
    monkeypatch.setattr(show, "facts", call)
    monkeypatch.setattr(show, "text", lambda shown: "")
    monkeypatch.setattr(terminal, "json_text", lambda shown: "")
    for command in (generate, chat, serve, eval, import_, export, plan):
        monkeypatch.setattr(command, "run", call)
    for what in ("step", "reading"):
        monkeypatch.setattr(measure, what, call)
        monkeypatch.setattr(measure, f"{what}_text", lambda measured: "")
    monkeypatch.setattr(measure_serving, "serving", call)
    monkeypatch.setattr(measure_serving, "serving_text", lambda measured: "")
    if module == "lm":
        lm.main.lm_main(arguments)
        assert called
    elif module.startswith("experiments."):
        declare = importlib.import_module(module).experiment
        lm.main.main(declare, arguments)
        assert called


def test_commands_in_documentation_are_found():
    documented = {(module, *arguments) for _, module, arguments in commands()}
    assert ("experiments.stdlib",) in documented
    assert ("lm", "eval", "runs/stdlib") in documented
    # A command nested in the quotes of a gcloud command.
    assert any("gs://my-bucket/runs" in arguments for arguments in documented)


def test_readme_starts_with_train_and_test_commands():
    first, second = fences(ROOT / "README.md", "sh")[:2]
    assert first == "pip install -e . && python -m experiments.stdlib\n"
    assert second == 'pip install -e ".[test]" && pytest\n'
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(part in ci for part in ("-e .\n", "-m experiments.stdlib", '-e ".[test]"', "pytest"))


def python_fences() -> list[tuple[str, str]]:
    return [(path.name, body) for path in READMES for body in fences(path, "python")]


@pytest.mark.parametrize("body", [body for _, body in python_fences()])
def test_python_code_in_documentation_runs(body, tmp_path, monkeypatch):
    compile(body, "README.md", "exec")
    monkeypatch.setattr(runs, "load_declaration", lambda folder: tiny_experiments.experiment())
    if "lm.train" in body:
        return  # tests/test_notebooks.py covers these calls
    module = imported(body, "readme", tmp_path, monkeypatch)
    if not hasattr(module, "experiment"):
        return
    assert "    main(experiment)\n" in body  # otherwise, running the file does nothing
    declared = module.experiment()
    assert declared.evals
    assert from_json(json.loads(json.dumps(to_json(declared)))) == declared
    for place in declared.places.values():
        declared.check_place(place)


def imported(body: str, name: str, folder: Path, monkeypatch) -> types.ModuleType:
    """Writes a code block to a module that from_json can import by name, and imports it."""
    (folder / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def test_model_trains_with_all_examples_in_extend_md(tmp_path, monkeypatch):
    page = ROOT / "experiments" / "EXTEND.md"
    names = ("objective", "model", "data", "optimizer", "evals")
    bodies = [body for body in fences(page, "python") if "class " in body]
    examples = {
        name: imported(body, f"extend_{name}", tmp_path, monkeypatch).experiment()
        for name, body in zip(names, bodies, strict=True)
    }
    parts = {name: getattr(example, name) for name, example in examples.items()}
    tiny = tiny_experiments.experiment()
    parts["model"] = dataclasses.replace(tiny.model, ffn=parts["model"].ffn)
    changes = ["name=extended", "objective.amount=0.2", "model.ffn.hidden=32", "data.count=20"]
    declared = dataclasses.replace(tiny, **parts, tokenizer=examples["data"].tokenizer)
    declared = override(declared, [*changes, "schedule.steps=2", "save.every=2"])
    trained = run.train(declared, workdir=tmp_path)
    assert runs.load(trained.folder).experiment == declared
    results = [json.loads(line) for line in (trained.folder / "eval.jsonl").open()]
    assert any(result["name"] == "python/valid" for result in results)


def test_documentation_contains_an_experiment_function():
    assert any("def experiment()" in body for _, body in python_fences())


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_documentation_links_and_paths_exist(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in link or (path.parent / link).exists(), link
    pattern = r"`((?:lm|experiments|tests|kernels_pallas|\.ci)/[\w./-]+)`"
    for name in re.findall(pattern, text):
        assert (ROOT / name).exists(), name


def test_experiments_readme_links_every_experiment_and_notebook():
    index = (ROOT / "experiments" / "README.md").read_text()
    notebooks = (ROOT / "experiments" / "notebooks").glob("*.ipynb")
    links = [f"({path.name})" for path in experiment_files.PATHS]
    links += [f"(notebooks/{path.name})" for path in notebooks]
    assert [link for link in links if link not in index] == []


def test_module_lists_match_the_import_order():
    (in_readme,) = (body for body in fences(ROOT / "README.md", "text") if "hf  " in body)
    assert listed_modules(in_readme) == list(ORDER)
    assert listed_modules(lm.__doc__) == list(ORDER[1:-1])  # without kernels_pallas and experiments


def test_lm_docstring_lists_every_module():
    paths = (ROOT / "lm").glob("[a-z]*")
    modules = [path.stem for path in paths if path.is_file() or (path / "__init__.py").exists()]
    assert sorted(listed_modules(lm.__doc__)) == sorted(modules)


def listed_modules(text: str) -> list[str]:
    """Returns the module names in lines such as 'optim, objectives   optimizers and losses'."""
    lines = re.findall(r"^(?:    )?([a-z_]+(?:, [a-z_]+)*)  ", text, re.MULTILINE)
    return [name for names in lines for name in names.split(", ")]


@pytest.mark.parametrize("term", TERMS)
def test_readme_contains_standard_term(term):
    assert term in (ROOT / "README.md").read_text().lower()


def test_readme_has_at_most_1200_words():
    assert len((ROOT / "README.md").read_text().split()) <= 1_200


def test_package_docstring_lists_every_module():
    missing = []
    for path in (ROOT / "lm").glob("*/[a-z]*.py"):
        package_text = (path.parent / "__init__.py").read_text()
        if not re.search(rf"\b{path.stem}\b", package_text):
            missing.append(str(path.relative_to(ROOT)))
    assert missing == []


def test_no_file_contains_a_machine_specific_path():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if not path.is_file():  # deleted but not committed
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if LOCAL_PATH.search(line):
                found.append(f"{name}:{number}: {line.strip()}")
    assert found == []
