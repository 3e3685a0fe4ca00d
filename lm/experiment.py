"""An experiment declares what to train, on what, how long, and where it may run. It does nothing.

`override` changes it by path, `to_json` and `from_json` carry it into a run folder and back,
`describe` prints it. Each package checks its own configs; this file checks what two packages must
agree on.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lm import declaration, model, serialization, trees
from lm.checkpoint import Save
from lm.data import BatchShape, Mixture, Shards, Source, TokenizerConfig
from lm.errors import UserError, check_name, check_seed, nearest
from lm.evals import Evaluator
from lm.model import Capacity
from lm.model.adapters.adapter import ROOT
from lm.objectives import NextToken, Objective
from lm.optim import Optimizer, Schedule
from lm.parallel import pipeline
from lm.parallel.mesh import Mesh, Place
from lm.parallel.sharding import rules_for
from lm.precision import Precision
from lm.training import ALL, Log

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")
LONGEST_NAME = 150  # a folder's name may have 255 bytes, and files are written aside with suffixes

# Fields that may differ when a run is resumed. They do not change its numbers, nor its name.
MAY_CHANGE = ("places", "log", "save", "evals", "sample")


@dataclass(frozen=True)
class Stage:
    """An earlier stage of a recipe, to start from.

    optimizer  'keep' continues with its optimizer state, 'reset' begins with a new one. In both
               cases the schedule begins at step 0; its warmup re-warms the learning rate.
    """

    name: str
    optimizer: str = "reset"

    def __post_init__(self) -> None:
        check_name("start.optimizer", self.optimizer, ("keep", "reset"))


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The declaration of a training run.

    Args:
      name: of the run's folder.
      seed: of the initial weights, the order of the data and dropout.
      start: initial weights: a run folder, a Hugging Face folder, or a stage of the same recipe.
        They are evaluated before the first update.
      data, tokenizer: the text, and how it becomes tokens; `tokenizer=Stage(...)` takes that of an
        earlier stage of the recipe, None that of `start`.
      batch: sequences per step and their length.
      objective, optimizer, schedule, precision: the training step.
      trainable: patterns of the paths of the weights that train, such as "blocks/*/attention/**";
        the others are frozen. With model.adapter, all means the adapter's.
      evals, save, log: evaluations, checkpoints and logs during training.
      places: where it may run. The first that fits is taken; all of them continue the same run.
      sample: prompts to continue when training ends.
    """

    name: str
    seed: int = 0
    start: str | Stage | None = None
    model: model.Config
    data: Source | Mixture | Shards
    tokenizer: TokenizerConfig | Stage | None
    batch: BatchShape
    objective: Objective = NextToken()
    optimizer: Optimizer
    schedule: Schedule
    precision: Precision = Precision()
    trainable: tuple[str, ...] = ALL
    evals: tuple[Evaluator, ...] = ()
    save: Save = Save(every=1_000)
    log: Log = Log()
    places: dict[str, Place] = field(default_factory=lambda: {"single": Place(mesh=Mesh())})
    sample: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        declaration.check_types(self)
        check_seed(seed=self.seed)
        self._check_names()
        self._check_vocabulary()
        self._check_trainable()
        self.objective.check(self.model, self.batch.packing)
        self._check_evals()
        self.schedule.resolve(self.batch)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of `sample`."""
        sample = self.sample or ()
        return (sample,) if isinstance(sample, str) else sample

    def _check_names(self) -> None:
        check_folder_name(self.name)
        if not self.places:
            raise UserError('places={} must name one place at least, as in {"single": Place()}.')

    def _check_vocabulary(self) -> None:
        if self.tokenizer is None and self.start is None:
            raise UserError(
                "tokenizer=None takes the tokenizer of `start`, and start=None; set one of the two."
            )
        vocab = getattr(self.tokenizer, "vocab", 0)  # that of a file is not known yet
        if vocab > self.model.vocab:
            raise UserError(
                f"tokenizer.vocab={vocab} is more than model.vocab={self.model.vocab}; "
                f"set model.vocab={vocab}."
            )

    def _check_trainable(self) -> None:
        if self.trainable == ALL:
            return
        if not self.trainable:
            raise UserError("trainable=() trains nothing; name weights, as in ('blocks/**',).")
        paths = list(trees.flatten(model.shapes(self.model)))
        for pattern in self.trainable:
            if not any(trees.matches(path, pattern) for path in paths):
                raise UserError(
                    f"trainable={pattern!r} matches no weight.{nearest(pattern, paths)}"
                )

    @property
    def trained(self) -> tuple[str, ...]:
        """Patterns of the weights that train: `trainable`; if that is all, and the model has an
        adapter, only the adapter and a scalar head."""
        if self.trainable != ALL or self.model.adapter is None:
            return self.trainable
        return (f"{ROOT}/**", *(("score/**",) if self.model.head == "scalar" else ()))

    def check_trained(self) -> None:
        """Raises UserError if quantized weights would train."""
        shapes, _ = trees.partition(model.shapes(self.model), self.trained)
        for path, weight in trees.flatten(shapes).items():
            if trees.is_leaf(weight):
                raise UserError(
                    f"model.quant={type(self.model.quant).__name__}(...) quantizes {path}, and "
                    "quantized weights cannot train: set model.adapter=model.LoRA(), or name other "
                    "weights in trainable."
                )

    def _check_evals(self) -> None:
        if isinstance(self.data, Shards):
            return  # their sources are known when they are read
        known = self.data.sources if isinstance(self.data, Mixture) else [self.data.label]
        for index, evaluator in enumerate(self.evals):
            for source in evaluator.sources():
                if source not in known:
                    raise UserError(
                        f"evals.{index}.source={source!r} is not a source of data."
                        f"{nearest(source, known)}"
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
        axes, shapes = (trees.flatten(f(self.model)) for f in (model.axes, model.shapes))
        for path, names in axes.items():
            rules_for(place).weight(
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

        # XLA's partitioner (jax 0.10) aborts the process on the all-to-all of tokens there.
        dispatches = [getattr(block.ffn, "dispatch", None) for block in self.model.layout.blocks]
        if place.mesh.pipe > 1 and any(isinstance(one, Capacity) for one in dispatches):
            raise UserError(
                f"mesh {place.mesh} cannot have both pipe and context with "
                "model.ffn.dispatch=Capacity(...); use Dropless(), or one of the two axes."
            )

    def pipeline_at(self, place: Place) -> pipeline.Schedule | None:
        """The pipeline schedule at `place`; None without pipeline parallelism."""
        if place.mesh.pipe == 1:
            return None
        return pipeline.Schedule(
            layers=self.model.layout.repeats,
            stages=place.mesh.pipe,
            circular_repeats=place.circular_repeats,
            microbatches=place.microbatches,
        )


def check_folder_name(name: str) -> None:
    """Raises UserError unless `name` can be the name of a run's folder."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise UserError(
            f"name={name!r} must be a folder's name: letters, digits and ._+=,- "
            f"after a letter or digit, at most {LONGEST_NAME} in all."
        )


def override(experiment: Experiment, changes: Sequence[str]) -> Experiment:
    """`experiment` with changes written as PATH=VALUE: 'model.layers=2', 'optimizer=Lion(b1=0.9)'.

    Values that differ from the declaration become part of the name, so that the run gets its own
    folder; except those of MAY_CHANGE, which a run may change when it is resumed. The order of
    `changes` does not matter. A `name=...` is used as it is.
    """
    values = split_changes(changes)
    changed, different = declaration.change(experiment, values)
    different = {p: v for p, v in different.items() if p.split(".")[0] not in MAY_CHANGE}
    if "name" in values or not different:
        return changed
    return replace(changed, name=changed_name(experiment.name, different))


def split_changes(changes: Sequence[str]) -> dict[str, str]:
    """['model.layers=2'] -> {'model.layers': '2'}."""
    values: dict[str, str] = {}
    for change in changes:
        path, equals, value = change.partition("=")
        path = path.strip()
        if not equals:
            raise UserError(f"--set {change} needs a value, as in {path}=VALUE.")
        if values.get(path, value) != value:
            raise UserError(f"--set {path} is given twice: {values[path]} and {value}.")
        values[path] = value
    return values


def changed_name(name: str, different: dict[str, Any]) -> str:
    """'stdlib+model.layers=2', with a hash if characters had to be replaced."""
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
    """Every path that `override` accepts, with its value and its type in words."""
    return declaration.settings(experiment)


def to_json(experiment: Experiment) -> dict[str, Any]:
    """For json.dumps. `from_json` gives back an equal experiment, in a later process too."""
    return serialization.to_json(experiment)


def from_json(content: dict[str, Any]) -> Experiment:
    """Inverse of `to_json`. Raises UserError for what this version does not know."""
    experiment = serialization.from_json(content)
    if not isinstance(experiment, Experiment):
        raise UserError(f"This is not an experiment but {type(experiment).__name__}.")
    return experiment


def identity(experiment: Experiment) -> dict[str, Any]:
    """The part of `to_json` that must not change when a run is resumed."""
    return {name: v for name, v in to_json(experiment).items() if name not in MAY_CHANGE}


def differences(a: Experiment, b: Experiment) -> list[str]:
    """'path: x -> y' for every difference."""
    return declaration.differences(a, b)


def describe(experiment: Experiment) -> str:
    """The resolved declaration as indented text; the nesting gives the paths of `override`."""
    return declaration.describe(experiment)
