"""What is minimised, the state, the step, and the loop that repeats it.

In a notebook `lm.train(experiment())` trains: this room can be called as `lm.run.train`.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from lm.train.guard import Stopper
from lm.train.loop import Evaluator, Outcome, Rates, loop
from lm.train.metrics import Log, Writer, read_lines
from lm.train.objective import NextToken
from lm.train.plot import plot_loss
from lm.train.state import State, abstract_state, init_state, init_state_from, state_shardings
from lm.train.step import compile_step, make_step

__all__ = [
    "Evaluator",
    "Log",
    "NextToken",
    "Outcome",
    "Rates",
    "State",
    "Stopper",
    "Writer",
    "abstract_state",
    "compile_step",
    "init_state",
    "init_state_from",
    "loop",
    "make_step",
    "plot_loss",
    "read_lines",
    "state_shardings",
]


class _Room(ModuleType):
    # `lm.train` is a room, and what a notebook says to train: the name has to mean both.
    def __call__(self, *args: Any, **options: Any) -> Any:
        return importlib.import_module("lm.run").train(*args, **options)


sys.modules[__name__].__class__ = _Room
