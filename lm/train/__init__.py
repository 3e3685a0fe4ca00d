"""What is minimised, the state, the step, and the loop that repeats it."""

from lm.train.guard import Stopper
from lm.train.loop import Evaluator, Outcome, Rates, loop
from lm.train.metrics import Log
from lm.train.objective import NextToken
from lm.train.state import State, abstract_state, init_state, state_shardings
from lm.train.step import compile_step, make_step

__all__ = [
    "Evaluator",
    "Log",
    "NextToken",
    "Outcome",
    "Rates",
    "State",
    "Stopper",
    "abstract_state",
    "compile_step",
    "init_state",
    "loop",
    "make_step",
    "state_shardings",
]
