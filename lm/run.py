"""The conductor: trains an experiment from raw text to a finished run.

Read this file first. `train` assembles the compiled program, prepares the text, and plays the loop
from the newest checkpoint or from the beginning.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from lm import (
    checkpoint,
    data,
    evals,
    model,
    serialization,
    summary,
    terminal,
    training,
    trees,
)
from lm.errors import UserError
from lm.experiment import Experiment, to_json
from lm.folders import RunFolder, models_of
from lm.model import Model
from lm.parallel import distributed, hardware
from lm.parallel.mesh import Mesh
from lm.prepared import check, prepare
from lm.program import Program, assemble, use_compilation_cache
from lm.recipe import Recipe
from lm.runs import Run
from lm.start import Start, check_inputs, check_models, first_state
from lm.stored import Stored


def train(
    experiment: Experiment | Recipe,
    *,
    on: str | None = None,
    mesh: Mesh | None = None,
    workdir: str | os.PathLike = "runs",
) -> Run:
    """Trains into WORKDIR/NAME/, or resumes where an earlier call was stopped or killed.

    Trains the stages of a recipe one after another, into WORKDIR/NAME/STAGE/, beginning with the
    first that is not finished; returns the last run.

    Args:
        on: one of the experiment's places; None: the first that fits this machine.
        mesh: replaces the mesh of that place.

    Raises UserError for what the user can fix, before anything is compiled if possible.
    """
    if isinstance(experiment, Recipe):
        return _train_stages(experiment, on, mesh, epath.Path(workdir) / experiment.name)
    return _train(experiment, on, mesh, workdir)


def _train_stages(recipe: Recipe, on: str | None, mesh: Mesh | None, workdir: epath.Path) -> Run:
    """Trains the stages of a recipe; stops early if one of them was stopped."""
    distributed.initialize()
    for stage in recipe.stages:
        if RunFolder(workdir / stage.name).facts is None:
            check_inputs(stage)
    for number, stage in enumerate(recipe.stages, start=1):
        if distributed.is_main():
            terminal.note(f"Stage {number} of {len(recipe.stages)}: {stage.name}")
        run = _train(stage, on, mesh, workdir, prefix=f"{stage.name}.")
        if run.stopped is not None:
            return run
    return run


def _train(
    experiment: Experiment,
    on: str | None,
    mesh: Mesh | None,
    workdir: str | os.PathLike,
    prefix: str = "",
) -> Run:
    """Trains an experiment; `prefix` stands before its paths in --set, as in a recipe."""
    _check_declared(experiment)
    distributed.initialize()
    use_compilation_cache()
    program = assemble(experiment, on, mesh, models_of(experiment))
    folder = RunFolder(epath.Path(workdir) / experiment.name)
    folder.check_same(experiment)
    # A run that was killed before its first checkpoint begins again, also from `start`.
    resumes = checkpoint.Store(folder.checkpoints).latest()
    start = None if resumes else Start.of(experiment, workdir)
    steps = program.schedule.steps

    with checkpoint.Store(folder.checkpoints, experiment.save) as store:
        distributed.check_shared(folder.path, store.latest())
        if (store.latest() or 0) >= steps:
            return _complete(folder, program, store, prefix)
        prepared = prepare(experiment, workdir)
        folder.check_same_text(prepared)
        if start:
            start.check_tokenizer(prepared.tokenizer)
        check_models(experiment.objective.loss_models().values(), prepared.tokenizer)
        check(experiment, prepared)
        stored = Stored(program, prepared, folder.path)
        folder.write(program, prepared, start.folder.origin if start else folder.origin)
        stored.compute(workdir, resumes=bool(resumes))
        state, frozen = first_state(program, folder, store, start)
        outcome, stopped = _play(program, prepared, stored, store, folder, state, frozen)

    run = Run(
        folder=folder.path,
        experiment=experiment,
        tokenizer=prepared.tokenizer,
        params=trees.merge(outcome.state.params, training.own(frozen)),
        step=outcome.step,
        stopped=stopped,
        mesh=program.mesh,
    )
    summary.finish(run, prepared, prefix)
    return run


def _check_declared(experiment: Any) -> None:
    if callable(experiment) and not isinstance(experiment, Experiment):
        name = getattr(experiment, "__name__", "experiment")
        raise UserError(f"train({name}) needs an Experiment: call it, as in train({name}()).")
    if not isinstance(experiment, Experiment):
        raise UserError(f"train(...) needs an Experiment, not {type(experiment).__name__}.")
    serialization.check_readable(experiment)


def _complete(folder: RunFolder, program: Program, store: checkpoint.Store, prefix: str) -> Run:
    """The finished run, opened as `lm.load` does."""
    steps = program.schedule.steps
    _, params = folder.params(store.latest(), None)
    run = Run(
        folder=folder.path,
        experiment=folder.experiment,
        tokenizer=folder.tokenizer(),
        params=params,
        step=store.latest(),
    )
    summary.say_complete(run, steps, prefix)
    return run


def _play(
    program: Program,
    prepared: data.Prepared,
    stored: Stored,
    store: checkpoint.Store,
    folder: RunFolder,
    state: training.State,
    frozen: Any,
) -> tuple[training.Outcome, str | None]:
    """The training loop; and the signal that stopped it early, if any."""
    experiment, start = program.experiment, store.latest() or 0
    steps = program.schedule.steps

    def batch(step: int) -> Any:
        sequences = experiment.batch.sequences_at(step)
        return program.put(lambda rows: stored.batch(step, rows), sequences)

    writers = experiment.log.writers(
        folder.path,
        name=experiment.name,
        after=start,
        steps=steps,
        declaration=to_json(experiment),
    )
    rates = training.Rates(
        tokens_before=experiment.batch.tokens_before,
        flops_per_token=model.train_flops(experiment.model, experiment.batch.length),
        peak_flops=hardware.machine_flops(program.mesh, experiment.precision.compute),
        bytes_per_token=stored.loader.bytes_per_token,
    )
    batches = contextlib.closing(data.prefetch(batch, start, steps))
    with training.Stopper() as stopper, batches as ahead:
        outcome = training.loop(
            state,
            lambda state, batch: program.step(state, batch, frozen),
            ahead,
            start=start,
            steps=steps,
            rates=rates,
            evaluations=_evaluations(program, prepared, stored, frozen),
            evaluate_first=bool(experiment.start),  # how good the weights are that it starts from
            writers=writers,
            store=store,
            stopper=stopper,
        )
    for writer in writers:
        writer.close()
    return outcome, stopper.cause if outcome.stopped else None


def _evaluations(
    program: Program, prepared: data.Prepared, stored: Stored, frozen: Any
) -> list[training.Evaluation]:
    """One for each of `experiment.evals`."""
    e, own = program.experiment, training.own(frozen)
    options = {"mesh": program.mesh, "precision": e.precision}
    models = training.frozen_models(e.model, program.models, frozen, **options)

    def evaluation(evaluator: evals.Evaluator) -> training.Evaluation:
        def run(step: int, params: Any) -> Sequence[evals.Result]:
            apply = Model(e.model, trees.merge(params, own), **options)
            context = evals.Context(step, prepared, e.batch, e.objective, models, stored.held_out)
            return evaluator.evaluate(apply, context)

        return training.Evaluation(evaluator.every, run)

    return [evaluation(evaluator) for evaluator in e.evals]
