"""lm: one experiment file declares model, mesh and schedule; the rest follows from it.

Packages and modules in import order:

    errors, terminal, trees               user errors, output, nested dicts of arrays
    declaration, serialization            dataclasses by path, to JSON and back
    precision                             mixed precision, loss scaling
    parallel                              mesh, sharding, pipeline, processes, hardware
    data                                  sources, tokenizers, packing, batch(step)
    quant                                 quantized weights
    model                                 Flax modules, adapters, and their configs
    hf                                    Hugging Face configs, weights, tokenizers
    optim, objectives                     optimizers, schedules, losses
    checkpoint, training                  Orbax checkpoints; state, step, loop
    generate, evals                       sampling, generation engine, text; validation
    experiment, recipe                    a run, or stages of runs, declared
    program, prepared                     compiled step, prepared text
    folders, runs, start, stored          run folders, trained models, first weights, stored numbers
    summary, run                          results printed; trains an experiment
    planning, exchange                    TPU slices planned; Hugging Face import and export
    serve                                 OpenAI-compatible server, chat page
    commands, main                        one file per verb; the command line

In a notebook:

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
