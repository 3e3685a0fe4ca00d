"""lm: one experiment file declares model, mesh and schedule; the rest follows from it.

The rooms, in the order in which data passes through them (imports run left to right only):

    errors, terminal    refusals in one sentence; progress bars and tables
    declaration         plain dataclasses changed by path, to JSON and back, as text
    trees, precision, mesh, sharding, pipeline, peers, distributed, hardware
    data                documents in, Batch out
    model               Batch in, logits out
    optim               optimizers and schedules
    train               objective, step, loop, metrics
    checkpoint          orbax: saves and restores on any mesh; the weights of Hugging Face
    generate, evals     a trained model speaks and is measured
    experiment          what is declared, as one object; its name follows its changes
    run, show, bench    the conductor (read lm/run.py first)
    plan                a run on a TPU slice before anyone books it
    exchange            Hugging Face folders in and out
    main                the two doors
"""

import importlib
from typing import Any

__all__ = ["load", "plan", "train"]


def __getattr__(name: str) -> Any:
    # The notebook's words, imported on first use so that a room can be had without all the others.
    # `lm.train` and `lm.plan` are rooms that can be called (see lm/train/__init__.py).
    if name == "load":
        return importlib.import_module("lm.run").load
    if name in ("plan", "train"):
        return importlib.import_module(f"lm.{name}")
    raise AttributeError(f"module 'lm' has no attribute {name!r}")
