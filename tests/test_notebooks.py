"""Notebooks run from top to bottom as scripts, and are committed without outputs."""

import json
import re
from pathlib import Path

import pytest

from lm import data
from lm.errors import UserError

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))

# Small values that replace those set by the cell tagged "parameters". The documents are similar, so
# that the loss decreases within a few steps.
SMALL = {
    "SOURCE": data.Documents(
        tuple(f"def read_{i}(path):\n    return open(path).read({i})\n" * 4 for i in range(64)),
        held_out=0.1,
    ),
    "OWN_TEXT": data.Documents(
        tuple(f"class Reader{i}:\n    path = {i}\n" * 4 for i in range(64)), held_out=0.1
    ),
    "STEPS": 6,
    "WORKDIR": "runs",
}


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path):
    for cell in cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells(path)):
        source = "".join(cell["source"])
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(SMALL) <= set(names)
            assert Path(names["WORKDIR"]).is_absolute()  # printed commands work in any folder
            names |= SMALL
    assert (tmp_path / "runs" / "quickstart" / "experiment.json").exists()
    lines = [line["bits_per_byte"] for line in names["lines"]]
    assert len(lines) == SMALL["STEPS"]
    assert lines[-1] < lines[0]
    out = capsys.readouterr().out
    assert "def read(" in out
    before, after = re.findall(r"step +\d+  .*bits_per_byte: ([\d.]+)", out)[-2:]
    assert float(after) < float(before)


def test_ipython_shows_user_error_as_one_line():
    """IPython prints what `_render_traceback_` returns instead of a traceback."""
    assert UserError("a=1 must be 2.")._render_traceback_() == ["UserError: a=1 must be 2."]
