"""Where the weights of a run come from: fresh, a run folder, a Hugging Face folder, or the stage
before in a recipe."""

import os
from dataclasses import dataclass
from typing import Any

from etils import epath

from lm import checkpoint, data, model, trees
from lm.errors import UserError
from lm.experiment import Experiment, Stage
from lm.program import Program
from lm.runs import RunFolder
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

    def check_tokenizer(self, tokenizer: data.Tokenizer) -> None:
        """Raises UserError if the weights were trained with another tokenizer."""
        own = self.folder.tokenizer()
        if own is None or own.checksum == tokenizer.checksum:
            return
        # tokenizer.json and tokenizer.model of one model have different checksums.
        if own.vocab != tokenizer.vocab or own.encode(_PROBE) != tokenizer.encode(_PROBE):
            path = str(self.folder.path)
            raise UserError(
                f"start={path!r} was trained with another tokenizer than the one declared; set "
                f"tokenizer=data.TokenizerFile(path={path!r}), or in a recipe tokenizer=Stage(...)."
            )

    def state(self, program: Program) -> tuple[State, Any]:
        """(state before the first step, frozen weights) of the new run."""
        e = program.experiment
        state_shardings, frozen_shardings = program.shardings
        shardings = trees.merge(state_shardings.params, frozen_shardings)
        _, params = self.folder.params(None, shardings, e.precision.params)
        state, frozen = program.init_from(params)
        if not self.keep_optimizer:
            return state, frozen
        store = checkpoint.Store(self.folder.checkpoints)
        abstract = program.abstract[0]
        before = store.restore(abstract)
        return state._replace(opt_state=before.opt_state, loss_scale=before.loss_scale), frozen

    def _check_fits(self, experiment: Experiment) -> None:
        declared = trees.flatten(model.shapes(experiment.model))
        stored = trees.flatten(model.shapes(self.folder.experiment.model))
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
