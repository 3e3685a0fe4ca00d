"""A recipe: stages that are trained one after another, such as pre-training and mid-training.

    Recipe(name="small", stages=(pretrain(), midtrain()))

Each stage is a complete Experiment, in runs/NAME/STAGE/. It starts from an earlier one with
`start=Stage("pretrain", optimizer="keep")`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lm import declaration, experiment
from lm.errors import UserError, nearest
from lm.experiment import MAY_CHANGE, Experiment, Stage, check_folder_name


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages in the order in which they are trained.

    Args:
      name: of the folder that holds the stages' run folders.
      stages: experiments whose names are those of the stages.
    """

    name: str
    stages: tuple[Experiment, ...]

    def __post_init__(self) -> None:
        declaration.check_types(self)
        check_folder_name(self.name)
        if not self.stages:
            raise UserError("stages=() must hold one experiment at least.")
        names: list[str] = []
        for stage in self.stages:
            if stage.name in names:
                raise UserError(f"stages have the name {stage.name!r} twice; rename one.")
            for field in ("start", "tokenizer"):
                earlier = getattr(stage, field)
                if isinstance(earlier, Stage) and earlier.name not in names:
                    raise UserError(
                        f"{stage.name}.{field}=Stage({earlier.name!r}) is not an earlier stage of "
                        f"the recipe.{nearest(earlier.name, names)}"
                    )
            names.append(stage.name)

    def stage(self, name: str) -> Experiment:
        """The stage of this name."""
        return next(stage for stage in self.stages if stage.name == name)


def stages_of(declared: Experiment | Recipe) -> tuple[Experiment, ...]:
    """The stages of a recipe; of an experiment, itself."""
    return declared.stages if isinstance(declared, Recipe) else (declared,)


def override(declared: Experiment | Recipe, changes: Sequence[str]) -> Experiment | Recipe:
    """`declared` with changes written as PATH=VALUE; in a recipe as STAGE.PATH=VALUE.

    As in `experiment.override`, values that differ become part of the name: in a recipe, of the
    recipe's name, while its stages keep theirs.
    """
    if isinstance(declared, Experiment):
        return experiment.override(declared, changes)
    values = experiment.split_changes(changes)
    name = values.pop("name", None)
    names = [stage.name for stage in declared.stages]
    by_stage: dict[str, dict[str, str]] = {}
    for path, value in values.items():
        stage, _, below = path.partition(".")
        if stage not in names or not below:
            raise UserError(
                f"--set {path} must begin with a stage of the recipe, as in {names[0]}.{path}="
                f"{value}.{nearest(stage, names)}"
            )
        if below == "name":
            raise UserError(f"--set {path} would rename a stage; set name=NAME for the recipe.")
        by_stage.setdefault(stage, {})[below] = value

    different, stages = {}, []
    for stage in declared.stages:
        changed, own = declaration.change(stage, by_stage.get(stage.name, {}))
        stages.append(changed)
        different |= {
            f"{stage.name}.{path}": value
            for path, value in own.items()
            if path.split(".")[0] not in MAY_CHANGE
        }
    if name is None:
        name = experiment.changed_name(declared.name, different) if different else declared.name
    return replace(declared, name=name, stages=tuple(stages))
