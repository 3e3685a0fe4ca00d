"""An experiment declares: what to train, on what, how long, and where it may run. It does nothing.

`override` changes it by path, `to_json` and `from_json` carry it into a run folder and back,
`describe` prints it. What an object of a room may hold is that room's business; here is only what
two rooms must agree on.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lm import declaration, model
from lm.checkpoint import Save
from lm.data import AnySource, BatchShape, Mixture, SentencePiece, Shards, TokenizerFile
from lm.errors import UserError, nearest
from lm.evals import Perplexity
from lm.model import Capacity
from lm.objectives import NextToken
from lm.optim import Optimizer
from lm.optim import Schedule as LearningRate
from lm.parallel.mesh import Mesh, Place
from lm.parallel.pipeline import Schedule
from lm.parallel.sharding import rules_at
from lm.precision import Precision
from lm.training import Log
from lm.trees import flatten

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")
LONGEST_NAME = 150  # a folder's name may have 255 bytes, and files are written aside with suffixes

# What may differ when a run is continued; everything else decides the numbers that it computes.
MAY_CHANGE = ("places", "log", "save", "evals", "sample")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The whole declaration of a training run.

    Args:
      name: of the run's folder.
      seed: of the initial weights, the order of the data and dropout.
      start: a run folder or a Hugging Face folder with whose weights training begins.
      data, tokenizer: what is read, and how text becomes tokens.
      batch: sequences per step and their length.
      objective, optimizer, schedule, precision: what is minimised, and how.
      evals, save, log: what happens beside training, and how often.
      places: where it may run. The first that fits is taken; all of them continue the same run.
      sample: prompts to continue when training is over.
    """

    name: str
    seed: int = 0
    start: str | None = None
    model: model.Config
    data: AnySource | Mixture | Shards
    tokenizer: SentencePiece | TokenizerFile
    batch: BatchShape
    objective: NextToken = NextToken()
    optimizer: Optimizer
    schedule: LearningRate
    precision: Precision = Precision()
    evals: tuple[Perplexity, ...] = ()
    save: Save = Save(every=1_000)
    log: Log = Log()
    places: dict[str, Place] = field(default_factory=lambda: {"single": Place(mesh=Mesh())})
    sample: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        declaration.check_types(self)
        self._check_names()
        self._check_vocabulary()
        self._check_evals()
        self.schedule.resolve(self.batch)

    def _check_names(self) -> None:
        if not NAME.fullmatch(self.name) or len(self.name) > LONGEST_NAME:
            raise UserError(
                f"name={self.name!r} must be a folder's name: letters, digits and ._+=,- "
                f"after a letter or digit, at most {LONGEST_NAME} in all."
            )
        if not self.places:
            raise UserError('places={} must name one place at least, as in {"single": Place()}.')

    def _check_vocabulary(self) -> None:
        vocab = getattr(self.tokenizer, "vocab", 0)  # a tokenizer's file is not read yet
        if vocab > self.model.vocab:
            raise UserError(
                f"tokenizer.vocab={vocab} is more than model.vocab={self.model.vocab}; "
                f"set model.vocab={vocab}."
            )

    def _check_evals(self) -> None:
        if isinstance(self.data, Shards):
            return  # their sources are known when they are read
        known = self.data.sources if isinstance(self.data, Mixture) else [self.data.label]
        for index, each in enumerate(self.evals):
            if each.source is not None and each.source not in known:
                raise UserError(
                    f"evals.{index}.source={each.source!r} is not a source of data."
                    f"{nearest(each.source, known)}"
                )

    def check_place(self, place: Place) -> None:
        """Raises UserError if batch or model do not divide over the mesh of `place`."""
        mesh = place.mesh
        parts = place.microbatches * mesh.batch_size // mesh.pipe
        sizes = {"batch.sequences=": self.batch.sequences}
        sizes |= {f"batch.ramp.{i}.1=": n for i, (_, n) in enumerate(self.batch.ramp)}
        for where, sequences in sizes.items():
            if sequences % parts:
                raise UserError(
                    f"{where}{sequences} must be a multiple of {parts}: microbatches="
                    f"{place.microbatches} times the {parts // place.microbatches} parts in which "
                    f"mesh {mesh} splits each."
                )
        self._check_context(place)
        self.pipeline_at(place)
        axes, shapes = flatten(model.axes(self.model)), flatten(model.shapes(self.model))
        for path, names in axes.items():
            rules_at(place).weight(
                names, shapes[path].shape, mesh.abstract(), f"mesh {mesh}: {path}"
            )

    def _check_context(self, place: Place) -> None:
        parts = place.mesh.context
        if parts == 1:
            return
        if self.batch.length % (2 * parts):
            raise UserError(
                f"batch.length={self.batch.length} must be a multiple of {2 * parts}: each of "
                f"mesh.context={parts} devices holds two parts of a sequence."
            )

        # XLA's partitioner, of jax 0.10, ends the process over the exchange of tokens there.
        dispatches = [getattr(block.ffn, "dispatch", None) for block in self.model.layout.blocks]
        if place.mesh.pipe > 1 and any(isinstance(one, Capacity) for one in dispatches):
            raise UserError(
                f"mesh {place.mesh} cannot have both pipe and context with "
                "model.ffn.dispatch=Capacity(...); use Dropless(), or one of the two axes."
            )

    def pipeline_at(self, place: Place) -> Schedule | None:
        """The schedule of the pipeline at `place`, where there is one."""
        if place.mesh.pipe == 1:
            return None
        return Schedule(
            layers=self.model.layout.repeats,
            stages=place.mesh.pipe,
            circular_repeats=place.circular_repeats,
            microbatches=place.microbatches,
        )


def override(experiment: Experiment, changes: Sequence[str]) -> Experiment:
    """`experiment` with changes written as PATH=VALUE: 'model.layers=2', 'optimizer=Lion(b1=0.9)'.

    What differs from the declaration becomes part of the name, so that it can't write into the
    named run; the order of `changes` does not matter. A new `name=...` stands as it is.
    """
    given: dict[str, str] = {}
    for written in changes:
        path, equals, value = written.partition("=")
        path = path.strip()
        if not equals:
            raise UserError(f"--set {written} needs a value, as in {path}=VALUE.")
        if given.get(path, value) != value:
            raise UserError(f"--set {path} is given twice: {given[path]} and {value}.")
        given[path] = value
    changed, different = declaration.change(experiment, given)
    if "name" in given or not different:
        return changed
    return replace(changed, name=_name(experiment.name, different))


def _name(name: str, different: dict[str, Any]) -> str:
    """'stdlib+model.layers=2', with a hash where characters had to be left out."""
    parts = [f"{path}={_plain(value)}" for path, value in sorted(different.items())]
    full = "+".join([name, *parts])
    safe = re.sub(r"[^A-Za-z0-9._+=,-]+", "-", full).strip("-")
    if safe == full and len(safe) <= LONGEST_NAME:
        return safe
    mark = hashlib.sha256(full.encode()).hexdigest()[:8]
    return f"{safe[: LONGEST_NAME - len(mark) - 1].rstrip('-')}-{mark}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else declaration.text(value)


def paths(experiment: Experiment) -> list[declaration.Setting]:
    """Every path that `override` knows, with its value and what may stand there, in words."""
    return declaration.settings(experiment)


def to_json(experiment: Experiment) -> dict[str, Any]:
    """For json.dumps. `from_json` gives back an equal experiment, in a later process too."""
    return declaration.to_json(experiment)


def from_json(written: dict[str, Any]) -> Experiment:
    """What `to_json` wrote. Raises UserError for a file that this version does not understand."""
    experiment = declaration.from_json(written)
    if not isinstance(experiment, Experiment):
        raise UserError(f"This is not an experiment but {type(experiment).__name__}.")
    return experiment


def identity(experiment: Experiment) -> dict[str, Any]:
    """The part of `to_json` that a run keeps from start to end."""
    return {name: v for name, v in to_json(experiment).items() if name not in MAY_CHANGE}


def differences(a: Experiment, b: Experiment) -> list[str]:
    """'path: x -> y' for everything that `b` declares otherwise."""
    return declaration.differences(a, b)


def describe(experiment: Experiment) -> str:
    """The resolved declaration as indented text; the nesting gives the paths of `override`."""
    return declaration.describe(experiment)
