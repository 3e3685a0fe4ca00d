"""Trains models with adapters on several meshes and writes the results as .npz for comparison.

python adapter_runs.py FOLDER RUN MESH ...       RUN is one of RUNS, MESH as in data=2,fsdp=4
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from mesh_runs import DENSE, SEQUENCES, VOCAB, Batch, batch, first_moment, whole

from lm import data, model, objectives, program, quant
from lm.objectives.on_policy import rewritten
from lm.parallel.mesh import Mesh, Place

STEPS = 3

BASE = replace(DENSE, model=replace(DENSE.model, dim=32))
PAIRS = {"batch": replace(DENSE.batch, packing=data.Pairs())}
LORA = model.LoRA(rank=4, targets=("**/attention/*", "**/ffn/**", "embed/table"))


def adapted(adapter, *, objective=BASE.objective, batch=BASE.batch, **fields):
    config = replace(BASE.model, adapter=adapter, **fields)
    return replace(BASE, model=config, objective=objective, batch=batch)


@dataclass(frozen=True, kw_only=True)
class OwnAnswers(objectives.NextToken):
    """The loss on answers that the model writes itself."""

    def loss(self, apply, batch, key, frozen):
        return super().loss(apply, rewritten(apply, batch, key, VOCAB), key, frozen)


NF4 = {"quant": quant.NF4(block=4)}
RUNS = {
    "lora": adapted(LORA),
    "qlora": adapted(LORA, **NF4),
    "dpo": adapted(LORA, **NF4, objective=objectives.DPO(beta=1.0), **PAIRS),
    "prefix": adapted(model.Prefix(tokens=3, std=0.5)),
    "bottleneck": adapted(model.Bottleneck(hidden=4)),
    "on_policy": adapted(LORA, objective=OwnAnswers()),
    "reward": adapted(LORA, head="scalar", objective=objectives.RewardModel(), **PAIRS),
}


def train(run: str, mesh: str) -> dict[str, np.ndarray]:
    """Losses and gradient norms of STEPS steps, the gradient of the first one, and the trained
    weights at the end."""
    place = Place(mesh=Mesh.parse(mesh), microbatches=2 if "pipe" in mesh else 1)
    assembled = program.assemble(replace(RUNS[run], places={"here": place}), "here")
    state, frozen = assembled.init()
    lines = []
    for step in range(STEPS):
        rows = batch(step)
        on_devices = assembled.put(lambda own, rows=rows: Batch(*(x[own] for x in rows)), SEQUENCES)
        state, metrics = assembled.step(state, on_devices, frozen)
        lines.append([float(metrics[name]) for name in ("loss", "grad_norm")])
        if step == 0:
            found = whole(first_moment(state), "gradient")
    return found | whole(state.params, "params") | {"lines": np.array(lines)}


if __name__ == "__main__":
    folder, run, *meshes = sys.argv[1:]
    for mesh in meshes:
        np.savez(Path(folder) / f"{mesh}.npz", **train(run, mesh))
