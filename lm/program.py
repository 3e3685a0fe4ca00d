"""An experiment at a place, as compiled functions."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import optax

from lm import model, optim, training, trees
from lm.data.batch import Batch, batch_type
from lm.errors import UserError
from lm.experiment import Experiment
from lm.objectives import START
from lm.parallel import hardware, sharding
from lm.parallel.mesh import Mesh, Place, choose


@dataclasses.dataclass(frozen=True)
class Program:
    """What an experiment compiles to at a place. Creating one allocates nothing.

    schedule        with every duration in steps
    shardings       of (state, frozen weights)
    abstract        shapes and formats of (state, frozen weights), sharded
    abstract_batch  shapes and formats of a full batch, sharded
    models          configs of the other models of the loss (see `training.Models`)
    step            jitted (state, batch, frozen) -> (state, metrics); the state is donated
    """

    experiment: Experiment
    place_name: str
    place: Place
    mesh: jax.sharding.Mesh
    rules: sharding.Rules
    schedule: optim.Schedule
    transformation: optax.GradientTransformation
    shardings: tuple[training.State, Any]
    abstract: tuple[training.State, Any]
    abstract_batch: Any
    models: training.Models
    step: Any

    def init(self, params: Any = None) -> tuple[training.State, Any]:
        """(state before the first step, frozen weights), created sharded, with these weights, which
        are donated; those that are missing are fresh. The weights of models of other configs must
        be added (see `training.with_models`)."""
        e = self.experiment
        return training.init_state(
            *(e.model, self.transformation, e.precision, e.seed, self.shardings, e.trained),
            models=self.models,
            params=params,
        )

    def lower(self) -> Any:
        """The training step, lowered for this place: `.compile()` it, or read its `.as_text()`."""
        state, frozen = self.abstract
        return self.step.lower(state, self.abstract_batch, frozen)

    def put(self, rows: Callable[[slice], Any], sequences: int) -> Any:
        """The global batch on the devices. Each process reads only the rows of its own devices.

        `rows(slice)` returns a NamedTuple of numpy arrays with these rows.
        """
        leading = sharding.batch_sharding(self.mesh, ndim=1)
        indices = leading.addressable_devices_indices_map((sequences,)).values()
        read = {span: rows(slice(*span)) for span in {_span(i, sequences) for i in indices}}
        parts = next(iter(read.values()))

        def place(field: int, part: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(
                (sequences, *part.shape[1:]),
                sharding.batch_sharding(self.mesh, ndim=part.ndim),
                lambda index: read[_span(index, sequences)][field][:, *index[1:]],
            )

        return type(parts)(*(place(i, part) for i, part in enumerate(parts)))


def _span(index: tuple[slice, ...], rows: int) -> tuple[int, int]:
    start, stop, _ = index[0].indices(rows)
    return start, stop


def assemble(
    experiment: Experiment,
    on: str | None = None,
    mesh: Mesh | None = None,
    models: training.Models = MappingProxyType({}),
) -> Program:
    """The program of an experiment at a place. Raises UserError if it does not fit this machine.

    `models` are the configs of the other models of the loss (see `folders.models_of`).
    """
    name, place = choose(experiment.places, on, mesh)
    dtype = experiment.precision.compute
    if dtype == "float16" and not hardware.compiles(dtype):
        raise UserError(
            f"precision.compute={dtype!r}: XLA cannot compile it for this processor; "
            "use 'bfloat16' or 'float32'."
        )
    return assemble_at(experiment, name, place, models=models)


def assemble_at(
    experiment: Experiment,
    name: str,
    place: Place,
    devices: Sequence[jax.Device] | None = None,
    models: training.Models = MappingProxyType({}),
) -> Program:
    """The program at this place, on `devices` (default: this machine's), which may be described by
    a topology instead of present."""
    e = experiment
    e.check_place(place)
    e.check_trained()
    starts = [name for name, path in e.objective.loss_models().items() if path == START]
    models = dict.fromkeys(starts) | dict(models)
    mesh, rules = place.mesh.build(devices), sharding.rules_for(place)
    schedule = e.schedule.resolve(e.batch)
    axes, _ = trees.partition(model.axes(e.model), e.trained)
    transformation = e.optimizer.build(schedule.at, axes)
    of_state = (e.model, transformation, e.precision)
    shardings = training.state_shardings(*of_state, mesh, rules, place.offload, e.trained, models)
    batch = _abstract_batch(e, mesh)
    step = training.make_step(
        *(e.model, e.objective, e.optimizer, schedule.at, e.precision),
        place=place,
        seed=e.seed,
        trainable=e.trained,
        models=models,
    )
    return Program(
        experiment=e,
        place_name=name,
        place=place,
        mesh=mesh,
        rules=rules,
        schedule=schedule,
        transformation=transformation,
        shardings=shardings,
        abstract=training.abstract_state(*of_state, shardings, e.trained, models),
        abstract_batch=batch,
        models=models,
        step=training.compile_step(step, shardings, mesh, rules, batch),
    )


def _abstract_batch(experiment: Experiment, mesh: jax.sharding.Mesh) -> Any:
    shape = experiment.batch
    formats = dict.fromkeys(Batch._fields, np.dtype("i4")) | {"weights": np.dtype("f4")}
    formats |= experiment.objective.stored_fields()

    def abstract(each: np.dtype) -> jax.ShapeDtypeStruct:
        full = (shape.sequences, shape.length, *each.shape)
        where = sharding.batch_sharding(mesh, ndim=len(full))
        return jax.ShapeDtypeStruct(full, each.base, sharding=where)

    return batch_type(tuple(formats))(*map(abstract, formats.values()))


def use_compilation_cache() -> None:
    """Caches compiled programs in JAX_COMPILATION_CACHE_DIR, or ~/.cache/lm/jax: those that take
    0.1 s to compile, or JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def cache_folder() -> Path:
    """Where this user's caches lie: ~/.cache/lm."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lm"
