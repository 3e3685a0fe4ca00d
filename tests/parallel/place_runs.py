"""Runs one step of a tiny experiment at several places; writes loss and gradient as .npz.

python place_runs.py FOLDER RUN PLACE ...

RUN is one of RUNS; PLACE as in "pipe=2,data=2 circular_repeats=2".
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from mesh_runs import DENSE, SEQUENCES, Play, batch, first_moment, whole

from lm import model, objectives, program
from lm.data.batch import Batch
from lm.parallel import distributed
from lm.parallel.mesh import Mesh, Place

LOCAL = model.Block(attention=replace(DENSE.model.attention, window=5))
MOE = model.MoE(
    experts=4, experts_per_token=2, hidden=16, z_loss=1e-3, router=model.SigmoidRouter()
)

# Four repeats of a local and a global layer, with a single layer before and after them.
DENSE = replace(
    DENSE,
    model=replace(DENSE.model, layers=10, pattern=(LOCAL, model.Block()), prefix=(model.Block(),)),
)
RUNS = {
    "dense": DENSE,
    # The loss as on TPUs, in chunks of the vocabulary that do not divide a device's shard of it.
    "words": replace(
        DENSE,
        model=replace(DENSE.model, layers=2, pattern=(), prefix=(), tied=True),
        objective=objectives.NextToken(z_loss=0.01, chunk=4, vocab_chunk=12),
    ),
    # Five layers do not divide evenly over stages.
    "uneven": replace(DENSE, model=replace(DENSE.model, layers=5, pattern=(), prefix=())),
    "dropless": replace(
        DENSE, model=replace(DENSE.model, ffn=MOE, layers=4, pattern=(), prefix=())
    ),
    "capacity": replace(
        DENSE,
        model=replace(
            DENSE.model,
            ffn=replace(MOE, dispatch=model.Capacity(factor=1.0)),
            layers=4,
            pattern=(),
            prefix=(),
        ),
    ),
}


def place(text: str) -> Place:
    """'pipe=2,data=2 circular_repeats=2 remat=block' -> Place(mesh=Mesh(pipe=2, data=2), ...)."""
    mesh, *settings = text.split()
    built = Mesh.parse(mesh)
    given = dict(setting.split("=") for setting in settings)
    given = {name: int(value) if value.isdigit() else value for name, value in given.items()}
    return Place(**{"mesh": built, "microbatches": built.pipe, **given})


def trips(play: Play) -> list[int]:
    """Returns the trip count of each loop in the compiled step, as annotated by the compiler."""
    rows = batch(0)
    on_devices = play.program.put(lambda own: Batch(*(x[own] for x in rows)), SEQUENCES)
    compiled = play.program.step.lower(play.program.abstract[0], on_devices, {}).compile()
    found = re.findall(r'"known_trip_count":\{"n":"(\d+)"\}', compiled.as_text())
    return [int(count) for count in found]


def main(folder: Path, name: str, places: list[str]) -> None:
    program.use_compilation_cache()
    for text in places:
        play = Play(RUNS[name], place(text))
        state, metrics = play.update(play.begin(), 0)
        out = whole(first_moment(state), "gradient") | {"loss": np.array(metrics["loss"])}
        out["trips"] = np.array(trips(play))
        if distributed.is_main():
            np.savez(folder / f"{text}.npz", **out)
        print(f"{name} at {text}: loss {metrics['loss']:.6f}", flush=True)


if __name__ == "__main__":
    distributed.initialize()
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
