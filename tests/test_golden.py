"""What each experiment comes to, as text that is kept: declaration, parameters, shardings, sizes.

A change that was meant is written with

    python tests/test_golden.py --write

and read in the diff. Nothing in it depends on the machine.
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
EIGHT = Mesh(data=2, fsdp=2, tensor=2)  # every experiment must divide over it


def golden(name: str) -> str:
    """The text of `show` at the first place, then on eight devices; of each stage of a recipe."""
    texts = []
    for experiment in stages_of(importlib.import_module(f"experiments.{name}").experiment()):
        place = next(iter(experiment.places))
        first = show.facts(experiment, on=place)
        eight = show.facts(experiment, on=place, mesh=EIGHT)
        eight["declaration"] = f"==== On mesh {EIGHT} ===="
        texts.append(f"{show.text(first)}\n\n{show.text(eight)}\n")
    return "\n".join(texts)


@pytest.mark.parametrize("name", experiment_files.NAMES)
def test_an_experiment_comes_to_what_it_did(name):
    path = GOLDEN / f"{name}.txt"
    kept, now = path.read_text() if path.exists() else "", golden(name)
    diff = difflib.unified_diff(
        kept.splitlines(), now.splitlines(), f"golden/{name}.txt", "now", lineterm="", n=2
    )
    assert kept == now, "\n".join(
        [f"{name} has changed. If that was meant: python tests/test_golden.py --write", *diff]
    )


def test_no_text_is_kept_of_an_experiment_that_is_gone():
    assert {path.stem for path in GOLDEN.glob("*")} == set(experiment_files.NAMES)


def write() -> None:
    """Writes the text of every experiment as it is now."""
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*"):
        path.unlink()
    for name in experiment_files.NAMES:
        (GOLDEN / f"{name}.txt").write_text(golden(name))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_golden.py --write")
    write()
