"""Runs a tiny experiment on several meshes and writes the results as .npz for comparison.

python mesh_runs.py FOLDER RUN MESH ...       RUN is one of RUNS, MESH as in data=2,fsdp=4

For each mesh, trains STEPS steps from the same initial state and records the loss and gradient norm
of every step, and the gradient and parameters of the first step. Saves a checkpoint of step SAVED
to FOLDER/saved-MESH, then restores this checkpoint and those already there, and continues training
from each.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm import checkpoint, data, model, optim, program, trees
from lm.data.batch import Batch
from lm.experiment import Experiment
from lm.parallel import distributed
from lm.parallel.mesh import Mesh, Place

SEQUENCES, LENGTH, VOCAB = 8, 16, 64
STEPS, SAVED = 25, 5

DENSE = Experiment(
    name="dense",
    model=model.Config(
        vocab=VOCAB,
        dim=16,
        layers=2,
        attention=model.GQA(heads=8, kv_heads=2, head_dim=4, position=model.RoPE()),
        ffn=model.SwiGLU(hidden=32),
        # Small embeddings could pass through zero in an update, which would make the norm after
        # them, and so the gradient, ill-conditioned.
        embed_std=0.5,
    ),
    data=data.Documents(texts=("unused",)),
    tokenizer=data.SentencePiece(vocab=VOCAB, kind="char", byte_fallback=False),
    batch=data.BatchShape(sequences=SEQUENCES, length=LENGTH),
    # Adam divides each gradient by its own magnitude, so rounding would decide the sign of the
    # update where a gradient is nearly zero. A large eps makes the update a smooth function of the
    # gradient.
    optimizer=optim.AdamW(eps=1e-3, weight_decay=0.1, clip_norm=1e3),
    schedule=optim.Constant(peak=1e-2, steps=STEPS),
)
RUNS = {
    "dense": DENSE,
    "dropless": replace(
        DENSE,
        model=replace(
            DENSE.model,
            ffn=model.MoE(
                experts=4,
                experts_per_token=2,
                hidden=16,
                router=model.SigmoidRouter(),
                balance=model.BiasBalance(),
                shared=model.Shared(hidden=16),
            ),
        ),
    ),
    "capacity": replace(
        DENSE,
        model=replace(
            DENSE.model,
            ffn=model.MoE(
                experts=4,
                experts_per_token=2,
                hidden=16,
                z_loss=1e-3,
                dispatch=model.Capacity(factor=1.0),
            ),
        ),
    ),
}


def batch(step: int) -> Batch:
    """Rows hold several documents followed by padding. Loss weights differ between rows and one row
    is all padding, so that a mean of per-device means would give a different loss."""
    random = np.random.default_rng(step)
    shape = (SEQUENCES, LENGTH)
    starts_bt = random.random(shape) < 0.2
    segments_bt = 1 + np.cumsum(starts_bt, axis=1, dtype=np.int32)
    ends_b1 = random.integers(1, LENGTH + 1, (SEQUENCES, 1))
    ends_b1[step % SEQUENCES] = 0
    segments_bt[np.arange(LENGTH) >= ends_b1] = 0
    first_bt = np.maximum.accumulate(np.where(starts_bt, np.arange(LENGTH), 0), axis=1)
    weights_bt = random.uniform(0, 2, shape) * random.integers(1, 5, (SEQUENCES, 1))
    return Batch(
        tokens=random.integers(0, VOCAB, shape, dtype=np.int32),
        targets=random.integers(0, VOCAB, shape, dtype=np.int32),
        weights=np.where(segments_bt > 0, weights_bt, 0).astype(np.float32),
        segments=segments_bt.astype(np.int32),
        positions=(np.arange(LENGTH) - first_bt).astype(np.int32),
    )


class Play:
    """An experiment's program on one mesh."""

    def __init__(self, experiment: Experiment, place: Place) -> None:
        self.program = program.assemble(replace(experiment, places={"here": place}), "here")

    def begin(self) -> Any:
        return self.program.init()[0]

    def update(self, state: Any, step: int) -> tuple[Any, dict[str, float]]:
        rows = batch(step)
        on_devices = self.program.put(lambda own: Batch(*(x[own] for x in rows)), SEQUENCES)
        state, metrics = self.program.step(state, on_devices, {})
        return state, {name: float(x) for name, x in metrics.items()}

    def finish(self, state: Any) -> np.ndarray:
        """Trains from step SAVED to the end and returns the losses."""
        losses = []
        for step in range(SAVED, STEPS):
            state, metrics = self.update(state, step)
            losses.append(metrics["loss"])
        return np.array(losses)


def whole(tree: Any, prefix: str) -> dict[str, np.ndarray]:
    """Returns {PREFIX/path: full array} on every process."""
    flat = trees.flatten(tree)
    if jax.process_count() > 1:
        flat = {k: multihost_utils.process_allgather(x, tiled=True) for k, x in flat.items()}
    return {f"{prefix}/{path}": np.asarray(x) for path, x in flat.items()}


def first_moment(state: Any) -> Any:
    """Adam's first moment: after one update, (1 - b1) times the gradient of that step."""
    adam = [
        part
        for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    ]
    return adam[0].mu


def uninterrupted(play: Play, store: checkpoint.Store) -> dict[str, np.ndarray]:
    state = play.begin()
    out = whole(state.params, "initial")
    lines = []
    for step in range(STEPS):
        state, metrics = play.update(state, step)
        lines.append(metrics)
        if step == 0:
            out |= whole(first_moment(state), "gradient") | whole(state.params, "params")
        if step + 1 == SAVED:
            store.save(SAVED, state)
            store.wait()
            out |= whole(state.params, "saved")
    return out | {
        name: np.array([line[name] for line in lines]) for name in ("loss", "grad_norm", "skipped")
    }


def main(folder: Path, name: str, meshes: list[str]) -> None:
    program.use_compilation_cache()
    save = checkpoint.Save(every=SAVED)
    for mesh in meshes:
        play = Play(RUNS[name], Place(mesh=Mesh.parse(mesh)))
        with checkpoint.Store(folder / f"saved-{mesh}", save) as store:
            out = uninterrupted(play, store)
        for saved in sorted(folder.glob("saved-*")):
            state = checkpoint.Store(saved).restore(play.program.abstract[0])
            origin = saved.name.removeprefix("saved-")
            out |= whole(state.params, f"restored {origin}")
            out[f"continued {origin}"] = play.finish(state)
        if distributed.is_main():
            np.savez(folder / f"{mesh}.npz", **out)
        distributed.barrier(mesh)
        print(f"{name} on {mesh}: loss {out['loss'][0]:.6f} to {out['loss'][-1]:.6f}", flush=True)


if __name__ == "__main__":
    distributed.initialize()
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
