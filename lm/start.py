"""Where the weights of a run come from: fresh, a run folder, a Hugging Face folder, or the stage
before in a recipe."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from etils import epath

from lm import checkpoint, data, model, terminal, training, trees
from lm.errors import UserError
from lm.experiment import Experiment, Stage
from lm.folders import RunFolder
from lm.model import Model
from lm.objectives import START
from lm.parallel import distributed, sharding
from lm.program import Program
from lm.training import State

# Text that two tokenizers of different training encode differently.
_PROBE = "The quick brown fox, 13 years old:\n    def jump(over): return over + 1  # \u00e4\n"


@dataclass(frozen=True)
class Start:
    """The folder that `experiment.start` names, opened. Its weights must fit `experiment.model`.

    keep_optimizer  continue with the optimizer state of that run too
    """

    folder: RunFolder
    keep_optimizer: bool = False

    @classmethod
    def of(cls, experiment: Experiment, workdir: str | os.PathLike) -> "Start | None":
        """None for fresh weights. Raises UserError if the folder does not fit the experiment."""
        start = experiment.start
        if start is None:
            return None
        if isinstance(start, Stage):
            path = epath.Path(workdir) / start.name
            if not (path / "experiment.json").exists():
                raise UserError(
                    f"start={start.name!r} names a stage that has not been trained: there is no "
                    f"{path}. Train the whole recipe, or name a folder."
                )
            opened = cls(RunFolder(path), start.optimizer == "keep")
        else:
            opened = cls(RunFolder.existing(start))
        opened._check_fits(experiment)
        return opened

    def check_tokenizer(self, tokenizer: data.Tokenizer, field: str = "start") -> None:
        """Raises UserError if the weights were trained with another tokenizer."""
        own = self.folder.tokenizer()
        if own is None or own.checksum == tokenizer.checksum:
            return
        # tokenizer.json and tokenizer.model of one model have different checksums.
        if own.vocab != tokenizer.vocab or own.encode(_PROBE) != tokenizer.encode(_PROBE):
            path = str(self.folder.path)
            raise UserError(
                f"{field}={path!r} was trained with another tokenizer than the one declared; set "
                f"tokenizer=data.TokenizerFile(path={path!r}), or in a recipe tokenizer=Stage(...)."
            )

    def state(self, program: Program) -> tuple[State, Any]:
        """(state before the first step, frozen weights) of the new run."""
        e, config = program.experiment, self.folder.experiment.model
        axes, shapes = model.axes(config), model.shapes(config)
        shardings = sharding.weight_shardings(axes, shapes, program.mesh, program.rules)
        _, params = self.folder.params(None, shardings, e.precision.params)
        if config.adapter is not None and not config.adapter.continues(e.model.adapter):
            if distributed.is_main():
                terminal.note(f"The adapter of {self.folder.path} is merged into its weights.")
            params = model.merge(config, params)
        declared = trees.flatten(model.shapes(e.model))
        kept = {path: x for path, x in trees.flatten(params).items() if path in declared}
        state, frozen = program.init(trees.unflatten(kept))
        if not self.keep_optimizer:
            return state, frozen
        store = checkpoint.Store(self.folder.checkpoints)
        abstract = program.abstract[0]
        before = store.restore(abstract)
        return state._replace(opt_state=before.opt_state, loss_scale=before.loss_scale), frozen

    def _check_fits(self, experiment: Experiment) -> None:
        ours, theirs = experiment.model, self.folder.experiment.model
        if theirs.adapter is not None and not theirs.adapter.continues(ours.adapter):
            theirs.adapter.check_merges(f"start={str(self.folder.path)!r}")
        declared, stored = (_shapes(config, ours.head) for config in (ours, theirs))
        for path in dict.fromkeys([*declared, *stored]):
            here, there = (
                "absent" if path not in flat else str(list(flat[path].shape))
                for flat in (declared, stored)
            )
            if here != there:
                raise UserError(
                    f"start={str(self.folder.path)!r} holds another model: {path} is {there} there "
                    f"and {here} here; declare model=runs.load_declaration(start).model."
                )


def _shapes(config: model.Config, head: str) -> dict[str, Any]:
    """Shapes of the weights that a model must share with one that starts from it and has this head:
    all but adapters, and heads that the other lacks."""
    plain = replace(config, adapter=None, quant=None)
    flat = trees.flatten(model.shapes(plain))
    left_out = ("score/",) if head == "vocab" else ("score/", "unembed/")
    return {path: x for path, x in flat.items() if not path.startswith(left_out)}


def check_inputs(stage: Experiment) -> None:
    """Raises UserError if files or folders that a stage reads do not exist, so that a recipe finds
    out before it trains the stages before it."""
    try:
        for source in data.sources_of(stage.data):
            if isinstance(source, data.Source):
                source.size()
        if isinstance(stage.start, str):
            RunFolder.existing(stage.start)
    except UserError as error:
        raise UserError(f"Stage {stage.name}: {error}") from None


def first_state(
    program: Program, folder: RunFolder, store: checkpoint.Store, start: Start | None
) -> tuple[training.State, Any]:
    """(state, frozen weights): from the newest checkpoint, or from the beginning."""
    latest = store.latest()
    if latest:
        if distributed.is_main():
            steps = program.schedule.steps
            terminal.note(f"Resuming {folder.path} from step {latest} of {steps}.")
        abstract_state, abstract_frozen = program.abstract
        saved = _saved(program, abstract_frozen)
        frozen = checkpoint.Store(folder.frozen).restore(saved) if saved else {}
        state = store.restore(abstract_state)
        frozen = training.with_models(frozen.get("params", {}), frozen.get("models", {}))
        return state, training.with_models(frozen, frozen_models(program))

    state, frozen = start.state(program) if start else program.init()
    if saved := _saved(program, frozen):
        # An earlier call may have been killed before its first checkpoint.
        if distributed.is_main():
            folder.frozen.rmtree(missing_ok=True)
        distributed.barrier("frozen weights removed")
        with checkpoint.Store(folder.frozen, checkpoint.Save(every=1)) as writer:
            writer.save(0, saved)
    return state, training.with_models(frozen, frozen_models(program))


def _saved(program: Program, frozen: Any) -> dict[str, Any]:
    """The frozen weights that the run folder holds: the model's own, and copies of what it started
    from."""
    copies = {
        name: params
        for name, params in frozen.get(training.MODELS, {}).items()
        if program.models[name] is None
    }
    parts = {"params": training.own(frozen), "models": copies}
    return {name: part for name, part in parts.items() if part}


def frozen_models(program: Program) -> dict[str, Any]:
    """The weights of the other models of the loss that are not those that training starts from."""
    paths = program.experiment.objective.loss_models()
    return {
        name: read_model(program, paths[name]).params for name, c in program.models.items() if c
    }


def read_model(program: Program, path: str) -> Model:
    """A frozen model from a run folder or a Hugging Face folder, sharded as at this place."""
    folder, precision = RunFolder.existing(path), program.experiment.precision
    config = folder.experiment.model
    where = training.model_shardings(config, precision, program.mesh, program.rules)
    _, params = folder.params(None, where)
    return Model(config, training.frozen_copy(params, precision))


def check_models(paths: Iterable[str], tokenizer: data.Tokenizer) -> None:
    """Raises UserError for a model of the objective that was trained with another tokenizer."""
    for path in paths:
        if path != START:
            Start(RunFolder.existing(path)).check_tokenizer(tokenizer, field="objective.teacher")
