"""Optimizers and learning-rate schedules: dataclasses that become optax transformations and
functions of the step."""

from lm.optim.optimizers import LAMB, SGD, Adafactor, AdamW, Lion, Muon, Optimizer
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
