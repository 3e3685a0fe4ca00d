"""Supervised training: the state, the step, and the loop that repeats it.

state     what a step changes and a checkpoint holds
gradient  of a whole batch, accumulated over micro-batches
step      one optimizer update, as a pure function
loop      repeats it: metrics, evaluations, checkpoints
guard     stops at SIGINT and SIGTERM
metrics   writes metrics.jsonl and eval.jsonl; terminal, TensorBoard, Weights & Biases
plot      draws the loss curve
"""

from lm.training.guard import Stopper
from lm.training.loop import Evaluation, Outcome, Rates, loop
from lm.training.metrics import Log, Writer, read_lines
from lm.training.plot import plot_loss
from lm.training.state import (
    ALL,
    MODELS,
    Models,
    State,
    abstract_state,
    frozen_copy,
    frozen_models,
    init_state,
    model_shardings,
    own,
    state_shardings,
    with_models,
)
from lm.training.step import compile_step, make_step

__all__ = [
    "ALL",
    "MODELS",
    "Evaluation",
    "Log",
    "Models",
    "Outcome",
    "Rates",
    "State",
    "Stopper",
    "Writer",
    "abstract_state",
    "compile_step",
    "frozen_copy",
    "frozen_models",
    "init_state",
    "loop",
    "make_step",
    "model_shardings",
    "own",
    "plot_loss",
    "read_lines",
    "state_shardings",
    "with_models",
]
