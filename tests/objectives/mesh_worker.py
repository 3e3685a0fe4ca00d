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
from lm.parallel import sharding
from lm.parallel.mesh import Mesh, Place

# Sizes that divide over eight devices.
STUDENT = dataclasses.replace(CONFIG, vocab=64, layers=1)
TEACHER = dataclasses.replace(CONFIG, vocab=72, dim=24, layers=1)
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
}


def run(weights: list[dict], mesh: jax.sharding.Mesh | None, rules: sharding.Rules | None):
    """{path: array} of losses and gradients."""
    student, reference, teacher = weights

    @jax.jit
    def compute(student, reference, teacher, batch):
        frozen = {
            "reference": model.Model(STUDENT, reference, mesh),
            "teacher": model.Model(TEACHER, teacher, mesh),
        }

        def of(objective):
            def total(params):
                loss = objective.loss(model.Model(STUDENT, params, mesh), batch, None, frozen)
                return loss.total, loss

            grads, loss = jax.grad(total, has_aux=True)(student)
            return {"gradient": grads, "loss": loss._asdict()}

        return {name: of(objective) for name, objective in OBJECTIVES.items()}

    if mesh is None:
        results = compute(*weights, BATCH)
    else:
        with sharding.use(mesh, rules):
            results = compute(student, reference, teacher, BATCH)
    return {path: np.asarray(x) for path, x in trees.flatten(results).items()}


def on_mesh(weights: list[dict], name: str):
    mesh = Mesh.parse(name)
    built, rules = mesh.build(), sharding.rules_for(Place(mesh=mesh))
    placed = [
        jax.device_put(params, sharding.weight_shardings(model.axes(config), params, built, rules))
        for params, config in zip(weights, (STUDENT, STUDENT, TEACHER))
    ]
    return run(placed, built, rules)


def main(folder: Path, meshes: list[str]) -> None:
    weights = [init(0, STUDENT), init(1, STUDENT), init(2, TEACHER)]
    np.savez(folder / "alone.npz", **run(weights, None, None))
    for name in meshes:
        np.savez(folder / f"{name}.npz", **on_mesh(weights, name))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
