"""What an experiment comes to before it runs: declaration, parameters, FLOPs, tokens, memory."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lm import model, optim, terminal, trees
from lm.errors import UserError
from lm.experiment import Experiment, describe, to_json
from lm.parallel import sharding
from lm.parallel.mesh import Mesh, Place, choose
from lm.parallel.pipeline import Schedule


def facts(
    experiment: Experiment, on: str | None = None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """As JSON. The place need not fit this machine: nothing is computed or allocated."""
    name, place = _place(experiment, on, mesh)
    experiment.check_place(place)
    device_mesh = place.mesh.abstract()
    e = experiment
    schedule = e.schedule.resolve(e.batch)
    axes, shapes = model.axes(e.model), model.shapes(e.model)
    rules = sharding.rules_at(place)
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
    derived = {name: getattr(schedule, name) for name in ("depth", "iterations", "bubble")}
    return dataclasses.asdict(schedule) | derived


def _place(experiment: Experiment, on: str | None, mesh: Mesh | None) -> tuple[str, Place]:
    try:
        return choose(experiment.places, on, mesh)
    except UserError:
        if on or mesh:
            raise
        return next(iter(experiment.places.items()))  # to look at, not to train at


def _partition(spec: jax.sharding.PartitionSpec) -> list[str]:
    """One entry per dimension: mesh axes joined by '+', or '' where every device has all of it."""
    return ["+".join(sharding.split_over(part)) for part in spec]


def memory(
    experiment: Experiment,
    mesh: jax.sharding.AbstractMesh,
    rules: sharding.Rules | None = None,
) -> dict[str, int]:
    """Of what lives from step to step, and of the gradients; activations depend on the compiler."""
    e = experiment
    axes, shapes = model.axes(e.model), model.shapes(e.model)
    where = sharding.weight_shardings(axes, shapes, mesh, rules)
    schedule = e.schedule.resolve(e.batch)
    transformation = e.optimizer.build(schedule.at, axes)
    state = jax.eval_shape(transformation.init, shapes)
    state_where = optim.state_shardings(transformation, shapes, where, mesh)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, e.precision.params), shapes)
    return {
        "parameters": _bytes_per_device(params, where),
        "gradients": _bytes_per_device(shapes, where),
        "optimizer": _bytes_per_device(state, state_where),
    }


def _bytes_per_device(tree: Any, where: Any) -> int:
    parts = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize, tree, where
    )
    return sum(jax.tree.leaves(parts))


def text(shown: dict[str, Any]) -> str:
    """For a person."""
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
        f"Pipeline    {pipeline['stages']} stages of {pipeline['circular_repeats']} x {pipeline['depth']} "
        f"layers, {pipeline['microbatches']} micro-batches: {pipeline['iterations']} iterations, "
        f"bubble {pipeline['bubble']:.1%}"
    )
    sizes = ", ".join(f"{what} {terminal.size(nbytes)}" for what, nbytes in memory.items())
    return "\n".join(
        [
            shown["declaration"],
            "",
            terminal.table(("parameter", "shape", "axes", "sharding", "count"), rows),
            "",
            f"Parameters  {counts['total']:,} in all, {counts['active']:,} at work on a token",
            f"FLOPs       {terminal.number(shown['flops_per_token'])} per token, forward and "
            f"backward; {shown['flops']:.3g} in all",
            f"Tokens      {shown['tokens']:,} in {shown['steps']:,} steps",
            f"Place       {place['name']}: mesh {place['mesh']}, {place['devices']} device(s)",
            *([stages] if stages else []),
            f"Memory      per device: {sizes}; activations come on top",
        ]
    )
