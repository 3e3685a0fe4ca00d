"""The experiment files in experiments/. Other modules there, such as parts that several experiments
share, are not experiments."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _declares(path: Path) -> bool:
    """Whether a file has a function `experiment`, its own or an imported one."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return "experiment" in names


PATHS = [p for p in sorted((ROOT / "experiments").glob("*.py")) if _declares(p)]
NAMES = [path.stem for path in PATHS]  # as on the command line
