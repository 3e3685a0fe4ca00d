"""Optimizers and learning-rate schedules: dataclasses that become optax transformations and
functions of the step.

optimizer   the base class Optimizer: direction, weight decay, learning rate; subclass it for yours
layout      matrices, stacks and vectors by logical axes: what decays, what Muon orthogonalizes
adamw, sgd, lion, lamb, adafactor, muon     the optimizers
schedules   the base class Schedule, and the schedules
shardings   shardings of the optimizer state
"""

from lm.optim.adafactor import Adafactor
from lm.optim.adamw import AdamW
from lm.optim.lamb import LAMB
from lm.optim.lion import Lion
from lm.optim.muon import Muon
from lm.optim.optimizer import Optimizer
from lm.optim.schedules import (
    WSD,
    Constant,
    InverseSqrt,
    Linear,
    OneCycle,
    Polynomial,
    Schedule,
    Tokens,
    WarmupCosine,
)
from lm.optim.sgd import SGD
from lm.optim.shardings import state_shardings

__all__ = [
    "LAMB",
    "SGD",
    "WSD",
    "Adafactor",
    "AdamW",
    "Constant",
    "InverseSqrt",
    "Linear",
    "Lion",
    "Muon",
    "OneCycle",
    "Optimizer",
    "Polynomial",
    "Schedule",
    "Tokens",
    "WarmupCosine",
    "state_shardings",
]
