"""lm: one experiment file declares model, mesh and schedule; the rest follows from it.

import lm
run = lm.train(experiment())
run = lm.load("runs/stdlib")
print(lm.plan(experiment(), on="v5p-64"))
"""

from typing import Any

__all__ = ["load", "plan", "train"]


def train(*args: Any, **options: Any) -> Any:
    """Trains an experiment; see lm.run.train."""
    from lm import run

    return run.train(*args, **options)


def load(*args: Any, **options: Any) -> Any:
    """Opens a run folder or a Hugging Face folder; see lm.runs.load."""
    from lm import runs

    return runs.load(*args, **options)


def plan(*args: Any, **options: Any) -> Any:
    """Plans an experiment on a TPU slice; see lm.planning.plan."""
    from lm import planning

    return planning.plan(*args, **options)
