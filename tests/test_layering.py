"""Checks the import order of packages, and that private names are not imported across packages.

"Package" means an entry of ORDER: a subpackage or module of `lm`, or another top-level folder. A
file may import its own package and those before it in ORDER, except for the pairs in APART. The
check reads the source, so imports inside functions count too. Importing a package by name at
run time (`importlib.import_module`) is forbidden.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# The import order. README.md and lm/__init__.py repeat it; test_docs.py checks that they agree.
ORDER = (
    "kernels_pallas",
    "errors",
    "terminal",
    "trees",
    "declaration",
    "serialization",
    "precision",
    "parallel",
    "data",
    "quant",
    "model",
    "hf",
    "optim",
    "objectives",
    "checkpoint",
    "training",
    "generate",
    "evals",
    "experiment",
    "recipe",
    "program",
    "prepared",
    "folders",
    "runs",
    "start",
    "stored",
    "summary",
    "run",
    "planning",
    "exchange",
    "serve",
    "commands",
    "main",
    "experiments",
)
# Imports that are forbidden although ORDER allows them: (importing package, imported package).
APART = {
    ("model", "data"),
    ("optim", "data"),
    ("optim", "model"),
    ("objectives", "optim"),
    ("training", "checkpoint"),
    ("generate", "checkpoint"),
    ("generate", "training"),
}
# Exempt from APART: the interface between data and later packages, without implementation.
CONTRACT = "lm.data.batch"
# Exempt from ORDER: lm/__init__.py imports packages inside functions, __main__ calls main.
ANYWHERE = ("lm/__init__.py", "lm/__main__.py")

NEVER = ("tensorflow", "torch", "clu", "ml_collections", "gin", "hydra")
# Exempt from NEVER: a benchmark that times torch in a separate process, if torch is installed.
PEERS = {("kernels_pallas/tools/bench_torch.py", "torch")}
# Slow to import, or optional dependencies: import only inside the functions that need them.
LAZY = ("matplotlib", "tensorflow_datasets", "pyarrow", "tensorboardX", "wandb", "IPython", "tqdm")

TOP = {"lm", "experiments", "kernels_pallas", "tests"}
TOP |= {"setup.py", "README.md", "LICENSE", ".ci", ".gitignore"}


class Import(NamedTuple):
    """`from module import names` (or `import module`); `lazy` if inside a function."""

    module: str
    names: tuple[str, ...]
    lazy: bool


def imports(source: str, package: str) -> Iterator[Import]:
    """Yields the imports of a file in `package`, with relative imports resolved."""
    tree = ast.parse(source)
    in_functions = {
        id(below)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for below in ast.walk(node)
    }
    for node in ast.walk(tree):
        lazy = id(node) in in_functions
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), lazy)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(up) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield Import(module, tuple(alias.name for alias in node.names), lazy)


def package_of(module: str) -> str | None:
    """'lm.model.rope' -> 'model', 'experiments.text' -> 'experiments', None for other packages."""
    first, *rest = module.split(".")
    if first == "lm":
        return rest[0] if rest else "lm"
    return first if first in ("kernels_pallas", "experiments") else None


def modules(found: Import) -> list[str]:
    """Returns the imported modules: `from lm import model` imports lm.model."""
    if found.module == "lm":
        return [f"lm.{name}" for name in found.names]
    return [found.module]


def violations(path: str, source: str) -> list[str]:
    """Returns messages about forbidden imports of the file at `path` (relative to the root)."""
    package = path.rsplit("/", 1)[0].replace("/", ".")
    own = package_of(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    found = []
    if path not in ANYWHERE and own not in ORDER:
        return [f"{path}: package {own!r} has no place in the order"]
    for each in imports(source, package):
        for module in modules(each):
            first = module.split(".")[0]
            if first in NEVER and ((path, first) not in PEERS or not each.lazy):
                found.append(f"{path} imports {first}")
            if first in LAZY and not each.lazy:
                found.append(f"{path} imports {first} outside a function")
            if path not in ANYWHERE and package_of(module):
                found += _order_violations(path, own, module, each.names)
    return found + [f"{path} imports {name!r} by name" for name in imported_by_name(source)]


def imported_by_name(source: str) -> list[str]:
    """Returns the strings in calls of import_module and __import__ that name `lm` or its parts."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            first = ast.unparse(node.args[0]).lstrip("f").strip("'\"")
            if called in ("import_module", "__import__") and re.match(r"lm(\.|$)", first):
                names.append(first)
    return names


def _order_violations(path: str, own: str, module: str, names: tuple[str, ...]) -> list[str]:
    other = package_of(module)
    if other == own:
        return []
    if other not in ORDER:
        return [f"{path} imports {module}, which has no place in the order"]
    if ORDER.index(other) > ORDER.index(own):
        return [f"{path} imports {module}, which comes after {own}"]
    if (own, other) in APART and module != CONTRACT:
        return [f"{path} imports {module}, from which {own} is kept apart"]
    parts = [*module.split("."), *names]
    private = [part for part in parts if part.startswith("_") and not part.startswith("__")]
    return [f"{path} imports {part}, private to {other}" for part in private]


def sources() -> list[str]:
    return sorted(
        str(path.relative_to(ROOT))
        for folder in ("lm", "kernels_pallas", "experiments")
        for path in (ROOT / folder).rglob("*.py")
    )


@pytest.mark.parametrize("path", sources())
def test_imports_follow_the_order(path):
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "why"),
    [
        ("lm/model/rope.py", "from lm.data.sources import Text", "kept apart"),
        ("lm/model/rope.py", "from lm import data", "kept apart"),
        ("lm/data/loader.py", "import lm.model", "comes after"),
        ("lm/data/loader.py", "from ..model import GQA", "comes after"),
        ("lm/training/loop.py", "def f():\n    from lm.evals import Perplexity", "comes after"),
        ("lm/training/loop.py", "from lm.checkpoint import Store", "kept apart"),
        ("lm/parallel/mesh.py", "import lm.experiment", "comes after"),
        ("lm/main.py", "import experiments.stdlib", "comes after"),
        ("lm/run.py", "from lm.model.attention import _scores", "private to model"),
        ("lm/run.py", "import lm.model._attention", "private to model"),
        ("kernels_pallas/op.py", "from lm import trees", "comes after"),
        ("lm/attic.py", "", "no place in the order"),
        ("lm/run.py", "from lm import attic", "no place in the order"),
        ("lm/run.py", "import matplotlib.pyplot as plt", "outside a function"),
        ("lm/run.py", "def f():\n    import torch.nn", "imports torch"),
        ("experiments/a.py", "class A:\n    import tensorflow", "imports tensorflow"),
        ("lm/data/loader.py", "importlib.import_module('lm.run')", "by name"),
        ("lm/data/loader.py", "import_module(f'lm.{name}')", "by name"),
        ("lm/__init__.py", "__import__('lm')", "by name"),
    ],
)
def test_checker_reports_forbidden_import(path, source, why):
    assert [v for v in violations(path, source) if why in v]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lm/model/rope.py", "from lm.errors import UserError\nimport kernels_pallas"),
        ("lm/model/rope.py", "from lm.model.param import _truncated\nfrom . import param"),
        ("lm/evals/perplexity.py", "from lm.data.batch import Batch\nfrom lm import model"),
        ("lm/training/plot.py", "def f():\n    import matplotlib.pyplot as plt"),
        (
            "experiments/a.py",
            "from lm import model\nfrom lm.main import main\nimport experiments.b",
        ),
        ("kernels_pallas/op.py", "import jax\nfrom kernels_pallas.reference import _block"),
    ],
)
def test_checker_accepts_allowed_import(path, source):
    assert violations(path, source) == []


def test_repository_root_contains_only_known_entries():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed.stdout.splitlines()}
    assert top <= TOP


# ---- Sizes of files and functions


def test_files_and_functions_of_lm_are_short():
    assert len((ROOT / "lm" / "run.py").read_text().splitlines()) < 250
    for path in sorted((ROOT / "lm").rglob("*.py")):
        text = path.read_text()
        assert len(text.splitlines()) <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"
