"""Run folders: the declaration, facts and weights of a run, or of a Hugging Face or PEFT folder.

A run lies in WORKDIR/NAME/ (lm/training/README.md lists its files). A Hugging Face folder opens as
a run of step 0.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import SingleDeviceSharding

from lm import checkpoint, data, hf, model, optim, training, trees
from lm.errors import UserError
from lm.experiment import MAY_CHANGE, Experiment, differences, from_json, identity, to_json
from lm.objectives import START, NextToken, RewardModel
from lm.parallel import distributed
from lm.precision import Precision
from lm.program import Program

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")

# Of experiment.json. Raised when older folders can no longer be read.
FORMAT = 2

# The data of a model that was imported.
NO_TEXT = data.Documents(texts=(), held_out=0.0)


class RunFolder:
    """A run folder, a Hugging Face folder or a PEFT folder, opened and checked once.

    path        of the folder
    facts       contents of experiment.json; None if it has not been written
    pretrained  the Hugging Face folder, if it is one

    Raises UserError for a damaged experiment.json, or one of an older format.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = epath.Path(path)
        self.facts = _read_facts(self.path)
        self.pretrained = hf.open_folder(self.path) if self.facts is None else None

    @classmethod
    def existing(cls, path: str | os.PathLike) -> "RunFolder":
        """Opens a folder that must hold a run or a Hugging Face model."""
        folder = cls(path)
        if folder.facts is None and folder.pretrained is None:
            raise UserError(
                f"{folder.path} is neither a run folder (it has no experiment.json) nor a Hugging "
                "Face folder (it has neither config.json nor adapter_config.json)."
            )
        return folder

    @property
    def checkpoints(self) -> epath.Path:
        """Checkpoints of the training state."""
        return self.path / "checkpoints"

    @property
    def frozen(self) -> epath.Path:
        """The weights that do not train, saved once."""
        return self.path / "frozen"

    @functools.cached_property
    def experiment(self) -> Experiment:
        """The declaration. Of a Hugging Face folder, one that starts from it, to be given data and
        a schedule with dataclasses.replace."""
        if self.facts is None:
            return _experiment_of(self.pretrained, self.path)
        try:
            return from_json(self.facts["experiment"])
        except UserError as error:
            raise UserError(f"{self.path / 'experiment.json'}: {error}") from None

    @property
    def origin(self) -> dict[str, Any] | None:
        """config.json and generation_config.json that the weights came with, if any."""
        if self.pretrained is None:
            return (self.facts or {}).get("origin")
        return {
            "config": self.pretrained.config_json,
            "generation_config": self.pretrained.generation_config,
        }

    def tokenizer(self) -> data.Tokenizer | None:
        """The tokenizer; None if there is none."""
        path = _tokenizer_folder(self.path, self.pretrained)
        return data.load_tokenizer(path) if data.has_tokenizer(path) else None

    def params(
        self, step: int | None, shardings: Any, dtype: str | None = None
    ) -> tuple[int, dict[str, Any]]:
        """(step, weights) of a checkpoint, by default the newest. The weights keep their stored
        format, or are converted to `dtype`."""
        if self.pretrained is not None:
            if step not in (None, 0):
                raise UserError(f"step={step}: {self.path} is a Hugging Face folder without steps.")
            return 0, self.pretrained.params(shardings, dtype)
        store = checkpoint.Store(self.checkpoints)
        step = store.latest() if step is None else step
        if step is None:
            raise UserError(
                f"{self.path} has no checkpoint yet; it was stopped before its first save."
            )
        e = self.experiment
        if shardings is None:
            one = SingleDeviceSharding(jax.local_devices()[0])
            shapes = jax.eval_shape(e.precision.to_params, model.shapes(e.model))
            shardings = jax.tree.map(lambda _: one, shapes)
        trained, rest = trees.partition(shardings, e.trained)
        if not (rest and self.frozen.exists()):  # an imported model has all in one checkpoint
            return step, _convert(store.restore_params(step, shardings), dtype)
        frozen = checkpoint.Store(self.frozen).restore_params(None, rest)
        return step, _convert(trees.merge(store.restore_params(step, trained), frozen), dtype)

    def check_same(self, experiment: Experiment) -> None:
        """Raises UserError if the run was begun with another declaration."""
        if self.facts is None or identity(self.experiment) == identity(experiment):
            return
        free = {name: getattr(experiment, name) for name in MAY_CHANGE}
        before = dataclasses.replace(self.experiment, **free)
        raise UserError(
            f"{self.path} was begun with another declaration "
            f"({'; '.join(differences(before, experiment))}). Give this one another name with "
            "--set name=NAME, or another --workdir."
        )

    def check_same_text(self, prepared: data.Prepared) -> None:
        """Raises UserError if the text has changed since the run was begun."""
        facts = self.facts
        if facts is not None and facts["data"]["fingerprint"] != prepared.fingerprint:
            raise UserError(
                f"The text has changed since {self.path} was begun. Bring back the files as they "
                "were, or begin another run with --set name=NAME."
            )

    def write(
        self, program: Program, prepared: data.Prepared, origin: dict[str, Any] | None
    ) -> None:
        """Writes experiment.json and the tokenizer, on process 0."""
        if not distributed.is_main():
            return
        counts = {
            f"{name}:{split}": dataclasses.asdict(count)
            for (name, split), count in prepared.counts.items()
        }
        facts = {
            "data": {"fingerprint": prepared.fingerprint, "counts": counts},
            "place": {"name": program.place_name, "mesh": str(program.place.mesh)},
            "devices": [device.device_kind for device in program.mesh.devices.flat],
        }
        write_facts(self.path, program.experiment, facts | ({"origin": origin} if origin else {}))
        prepared.tokenizer.save(self.path)


def models_of(experiment: Experiment) -> training.Models:
    """The configs of the other models that the loss needs, by name."""
    return {
        name: None if path == START else RunFolder.existing(path).experiment.model
        for name, path in experiment.objective.loss_models().items()
    }


def _convert(params: Any, dtype: str | None) -> Any:
    return params if dtype is None else Precision(params=dtype).to_params(params)


def _read_facts(folder: epath.Path) -> dict[str, Any] | None:
    path = folder / "experiment.json"
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text())
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or not facts.keys() >= {"experiment", "data"}:
        raise UserError(
            f"{path} is damaged: it holds no declaration. Restore it, or delete {folder}."
        )
    if facts.get("format") != FORMAT:
        raise UserError(
            f"{path} was written by another version of lm (format {facts.get('format', 1)}, this "
            f"one reads {FORMAT}); open the run with that version, or train it again under another "
            "name."
        )
    return facts


def write_facts(folder: epath.Path, experiment: Experiment, facts: dict[str, Any]) -> None:
    """Writes experiment.json: the declaration, `facts`, versions and git revision."""
    made_by = {
        "format": FORMAT,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git": _git_revision(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / "experiment.json.new"
    content = {"experiment": to_json(experiment), **facts, **made_by}
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(folder / "experiment.json")


def _git_revision() -> str | None:
    """Revision of the code, with '+' for uncommitted changes; None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _tokenizer_folder(path: epath.Path, pretrained: hf.Pretrained | None) -> epath.Path:
    """An adapter's folder may leave the tokenizer to that of its model."""
    return path if pretrained is None or data.has_tokenizer(path) else pretrained.folder


def _experiment_of(pretrained: hf.Pretrained, path: epath.Path) -> Experiment:
    scores = pretrained.config.head == "scalar"
    packing = data.Pairs() if scores else data.BestFit()
    return Experiment(
        name=re.sub(r"[^A-Za-z0-9._+=,-]", "-", path.name).lstrip("._+=,-") or "pretrained",
        start=str(path),
        model=pretrained.config,
        data=NO_TEXT,
        tokenizer=data.TokenizerFile(path=str(_tokenizer_folder(path, pretrained))),
        batch=data.BatchShape(sequences=1, length=pretrained.length, packing=packing),
        objective=RewardModel() if scores else NextToken(),
        optimizer=optim.AdamW(clip_norm=1.0),
        schedule=optim.Constant(peak=1e-5, steps=1),
        precision=Precision(
            params="bfloat16" if pretrained.stored_dtypes() == {"bfloat16"} else "float32"
        ),
    )
