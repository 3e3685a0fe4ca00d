"""Notebooks run from top to bottom as scripts, and are kept without outputs."""

import json
from pathlib import Path

import pytest

from lm import data

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))

# What the cell tagged "parameters" sets, made small. The text is of one kind, so that a few updates
# suffice to see the loss fall.
SMALL = {
    "SOURCE": data.Documents(
        tuple(f"def read_{i}(path):\n    return open(path).read({i})\n" * 4 for i in range(64)),
        held_out=0.1,
    ),
    "STEPS": 6,
}


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    for cell in cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells(path)):
        source = "".join(cell["source"])
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(SMALL) <= set(names)
            names |= SMALL
    assert (tmp_path / "runs" / "quickstart" / "experiment.json").exists()
    lines = [line["bits_per_byte"] for line in names["lines"]]
    assert len(lines) == SMALL["STEPS"]
    assert lines[-1] < lines[0]
    assert "def read(" in capsys.readouterr().out
