"""Losses and gradients of objectives on meshes of 8 virtual devices and on one, written as .npz.

python mesh_worker.py FOLDER MESH ...       MESH as in data=2,fsdp=4
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
from packed_pairs import CONFIG, documents, in_rows, init, pack

from lm import model, objectives, trees
from lm.data.batch import extend
from lm.parallel import sharding
from lm.parallel.mesh import Mesh, Place

# Sizes that divide over eight devices.
STUDENT = dataclasses.replace(CONFIG, vocab=64, layers=1)
SCALAR = dataclasses.replace(STUDENT, head="scalar")
TEACHER = dataclasses.replace(CONFIG, vocab=72, dim=24, layers=1)
CONFIGS = STUDENT, STUDENT, TEACHER, SCALAR
BATCH = pack([*in_rows(documents(28), 4), []], 40)
OBJECTIVES = {
    "dpo": objectives.DPO(beta=0.3, label_smoothing=0.1),
    "distill": objectives.Distill(
        teacher="teacher",
        divergence=objectives.JSD(),
        temperature=1.3,
        cross_entropy=0.2,
        top_k=7,
        chunk=5,
    ),
    "reward": objectives.RewardModel(margin=0.2, center=0.1),
}
OBJECTIVES |= {
    f"{name}_stored": dataclasses.replace(OBJECTIVES[name], stored=True)
    for name in ("dpo", "distill")
}


def run(weights: list[dict], mesh: jax.sharding.Mesh | None, rules: sharding.Rules | None):
    """{path: array} of losses and gradients."""

    @jax.jit
    def compute(student, reference, teacher, scalar, batch):
        frozen = {
            "reference": model.Model(STUDENT, reference, mesh),
            "teacher": model.Model(TEACHER, teacher, mesh),
        }

        def of(objective):
            is_scalar = objective.head == "scalar"
            config, params = (SCALAR, scalar) if is_scalar else (STUDENT, student)
            is_stored = bool(objective.stored_fields())
            numbers = objective.precompute(config, batch, frozen) if is_stored else {}
            models = {} if is_stored else frozen
            extended = extend(batch, numbers)

            def total(params):
                loss = objective.loss(model.Model(config, params, mesh), extended, None, models)
                return loss.total, loss

            grads, loss = jax.grad(total, has_aux=True)(params)
            return {"gradient": grads, "loss": loss._asdict()}

        return {name: of(objective) for name, objective in OBJECTIVES.items()}

    if mesh is None:
        results = compute(*weights, BATCH)
    else:
        with sharding.use(mesh, rules):
            results = compute(*weights, BATCH)
    return {path: np.asarray(x) for path, x in trees.flatten(results).items()}


def on_mesh(weights: list[dict], name: str):
    mesh = Mesh.parse(name)
    built, rules = mesh.build(), sharding.rules_for(Place(mesh=mesh))
    placed = [
        jax.device_put(params, sharding.weight_shardings(model.axes(config), params, built, rules))
        for params, config in zip(weights, CONFIGS)
    ]
    return run(placed, built, rules)


def main(folder: Path, meshes: list[str]) -> None:
    weights = [init(seed, config) for seed, config in enumerate(CONFIGS)]
    np.savez(folder / "alone.npz", **run(weights, None, None))
    for name in meshes:
        np.savez(folder / f"{name}.npz", **on_mesh(weights, name))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
