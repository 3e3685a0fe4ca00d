"""Golden files: the output of `show` for each experiment (config, parameters, shardings, sizes).

After an intended change, rewrite them and review the diff:

    python tests/test_golden.py --write

Golden files do not depend on the machine.
"""

import difflib
import importlib
import sys
from pathlib import Path

import experiment_files
import pytest

from lm.parallel.mesh import Mesh
from lm.planning import show
from lm.recipe import stages_of

GOLDEN = Path(__file__).parent / "golden"
EIGHT = Mesh(data=2, fsdp=2, tensor=2)  # an experiment must be divisible over this mesh
FOUR = dict.fromkeys(("smollm2_lora", "smollm2_dpo"), Mesh(data=2, fsdp=2))  # 9 heads, 4 sequences


def golden(name: str) -> str:
    """Returns the output of `show` at the first place and on a mesh, for each stage."""
    texts = []
    for experiment in stages_of(importlib.import_module(f"experiments.{name}").experiment()):
        place = next(iter(experiment.places))
        first = show.facts(experiment, on=place)
        mesh = FOUR.get(name, EIGHT)
        eight = show.facts(experiment, on=place, mesh=mesh)
        eight["declaration"] = f"==== On mesh {mesh} ===="
        texts.append(f"{show.text(first)}\n\n{show.text(eight)}\n")
    return "\n".join(texts)


@pytest.mark.parametrize("name", experiment_files.NAMES)
def test_experiment_matches_its_golden_file(name):
    path = GOLDEN / f"{name}.txt"
    kept, now = path.read_text() if path.exists() else "", golden(name)
    diff = difflib.unified_diff(
        kept.splitlines(), now.splitlines(), f"golden/{name}.txt", "now", lineterm="", n=2
    )
    assert kept == now, "\n".join(
        [f"{name} has changed. If intended, run: python tests/test_golden.py --write", *diff]
    )


def test_golden_files_correspond_to_experiments():
    assert {path.stem for path in GOLDEN.glob("*")} == set(experiment_files.NAMES)


def write() -> None:
    """Rewrites all golden files."""
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*"):
        path.unlink()
    for name in experiment_files.NAMES:
        (GOLDEN / f"{name}.txt").write_text(golden(name))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_golden.py --write")
    write()
