"""Summary of an experiment before it runs: declaration, parameters, FLOPs, tokens, memory."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lm import model, optim, terminal, training, trees
from lm.errors import UserError
from lm.experiment import Experiment, describe, to_json
from lm.folders import models_of
from lm.parallel import sharding
from lm.parallel.mesh import Mesh, Place, choose
from lm.parallel.pipeline import Schedule


def facts(
    experiment: Experiment, on: str | None = None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """The summary as JSON. The place need not fit this machine: nothing is computed or allocated.

    Args:
        on: name of a place (default: the first that fits this machine, or else the first).
        mesh: replaces the mesh of the place.
    """
    name, place = _place(experiment, on, mesh)
    experiment.check_place(place)
    device_mesh = place.mesh.abstract()
    e = experiment
    schedule = e.schedule.resolve(e.batch)
    axes, shapes = model.axes(e.model), model.shapes(e.model)
    rules = sharding.rules_for(place)
    parameters = [
        {
            "path": path,
            "shape": list(shape.shape),
            "axes": list(names),
            "sharding": _partition(rules.weight(names, shape.shape, device_mesh, path)),
            "count": math.prod(shape.shape),
        }
        for (path, names), shape in zip(
            trees.flatten(axes).items(), trees.flatten(shapes).values(), strict=True
        )
    ]
    tokens = e.batch.tokens_before(schedule.steps)
    counts = model.parameter_count(e.model)
    flops = model.train_flops(e.model, e.batch.length)
    return {
        "experiment": to_json(e),
        "declaration": describe(e),
        "place": {"name": name, "mesh": str(place.mesh), "devices": place.mesh.size},
        "pipeline": _pipeline(e.pipeline_at(place)),
        "parameters": parameters,
        "parameter_count": counts._asdict(),
        "flops_per_token": flops,
        "flops": flops * tokens,
        "steps": schedule.steps,
        "tokens": tokens,
        "memory_bytes_per_device": memory(experiment, device_mesh, rules),
    }


def _pipeline(schedule: Schedule | None) -> dict[str, Any] | None:
    if schedule is None:
        return None
    properties = {name: getattr(schedule, name) for name in ("depth", "iterations", "bubble")}
    return dataclasses.asdict(schedule) | properties


def _place(experiment: Experiment, on: str | None, mesh: Mesh | None) -> tuple[str, Place]:
    try:
        return choose(experiment.places, on, mesh)
    except UserError:
        if on or mesh:
            raise
        return next(iter(experiment.places.items()))  # a place to show need not fit


def _partition(spec: jax.sharding.PartitionSpec) -> list[str]:
    """One entry per dimension: mesh axes joined by '+', '' for a dimension that is not sharded."""
    return ["+".join(sharding.split_over(part)) for part in spec]


def memory(
    experiment: Experiment,
    mesh: jax.sharding.AbstractMesh,
    rules: sharding.Rules | None = None,
) -> dict[str, int]:
    """Bytes per device of parameters, gradients and optimizer state, and of the objective's other
    models if it has any. Activations are not included: they depend on the compiler."""
    e = experiment
    axes, shapes = model.axes(e.model), model.shapes(e.model)
    params = jax.eval_shape(e.precision.to_params, shapes)
    shardings = sharding.weight_shardings(axes, params, mesh, rules)
    # Frozen weights have neither gradients nor optimizer state.
    trained_axes, trained, where = (
        trees.partition(tree, e.trained)[0] for tree in (axes, shapes, shardings)
    )
    transformation = e.optimizer.build(e.schedule.resolve(e.batch).at, trained_axes)
    state = jax.eval_shape(transformation.init, trained)
    models = 0
    for config in models_of(e).values():
        other = e.model if config is None else config
        weights = jax.eval_shape(
            lambda x: training.frozen_copy(x, e.precision), model.shapes(other)
        )
        placed = sharding.weight_shardings(model.axes(other), weights, mesh, rules)
        if config is None:  # a copy of what trains
            weights, placed = (trees.partition(x, e.trained)[0] for x in (weights, placed))
        models += _bytes_per_device(weights, placed)
    return {
        "parameters": _bytes_per_device(params, shardings),
        "gradients": _bytes_per_device(trained, where),
        "optimizer": _bytes_per_device(
            state, optim.state_shardings(transformation, trained, where, mesh)
        ),
    } | ({"models": models} if models else {})


def _bytes_per_device(tree: Any, shardings: Any) -> int:
    parts = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize,
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(parts))


def text(shown: dict[str, Any]) -> str:
    """The summary as text."""
    counts, memory = shown["parameter_count"], shown["memory_bytes_per_device"]
    place = shown["place"]
    rows = [
        (
            row["path"],
            " x ".join(map(str, row["shape"])),
            ", ".join(row["axes"]),
            ", ".join(part or "-" for part in row["sharding"]),
            f"{row['count']:,}",
        )
        for row in shown["parameters"]
    ]
    pipeline = shown["pipeline"]
    stages = pipeline and (
        f"Pipeline    {pipeline['stages']} stages of {pipeline['circular_repeats']} x "
        f"{pipeline['depth']} layers, {pipeline['microbatches']} micro-batches: "
        f"{pipeline['iterations']} iterations, bubble {pipeline['bubble']:.1%}"
    )
    sizes = ", ".join(f"{what} {terminal.size(nbytes)}" for what, nbytes in memory.items())
    return "\n".join(
        [
            shown["declaration"],
            "",
            terminal.table(("parameter", "shape", "axes", "sharding", "count"), rows),
            "",
            f"Parameters  {counts['total']:,} total, {counts['active']:,} active per token",
            f"FLOPs       {terminal.number(shown['flops_per_token'])} per token, forward and "
            f"backward; {shown['flops']:.3g} total",
            f"Tokens      {shown['tokens']:,} in {shown['steps']:,} steps",
            f"Place       {place['name']}: mesh {place['mesh']}, {place['devices']} device(s)",
            *([stages] if stages else []),
            f"Memory      per device: {sizes}; without activations",
        ]
    )
