"""The size of the compiled program does not depend on the number of layers, and later processes
take it from the compilation cache."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_experiments import LENGTH, config, experiment

from lm import model, program
from lm.data.batch import Batch
from lm.parallel.mesh import Mesh, Place

ROOT = Path(__file__).parents[2]


def lowered(remat: str = "none", **fields) -> list[str]:
    """Returns the lines of the lowered training step, with every number replaced by 0."""
    place = Place(mesh=Mesh(), remat=remat)
    assembled = program.assemble(experiment(model=config(**fields), places={"cpu": place}))
    whole = jax.ShapeDtypeStruct((4, LENGTH), jnp.int32)
    weights = jax.ShapeDtypeStruct((4, LENGTH), jnp.float32)
    batch = Batch(tokens=whole, targets=whole, weights=weights, segments=whole, positions=whole)
    state, frozen = assembled.abstract
    text = assembled.step.lower(state, batch, frozen).as_text()
    return re.sub(r"\d+", "0", text).splitlines()


LOCAL = model.GQA(heads=2, kv_heads=1, head_dim=8, position=model.RoPE(), window=8)


@pytest.mark.parametrize(
    ("fields", "depths"),
    [
        ({}, (2, 4, 16)),
        ({"remat": "block"}, (2, 16)),
        ({"ffn": model.MoE(experts=4, experts_per_token=2, hidden=8)}, (2, 16)),
        ({"pattern": (model.Block(attention=LOCAL), model.Block())}, (4, 16)),
    ],
    ids=["dense", "remat", "moe", "pattern"],
)
def test_the_program_size_does_not_depend_on_the_number_of_layers(fields, depths):
    programs = [lowered(layers=layers, **fields) for layers in depths]
    assert len(programs[0]) > 100
    assert len({len(lines) for lines in programs}) == 1
    # Compare sorted lines: only the names that the compiler numbers may differ.
    assert all(sorted(lines) == sorted(programs[0]) for lines in programs[1:])


def test_the_program_grows_if_layers_are_unrolled():
    """A pattern as long as the model is not repeated, so the program grows with it."""
    two, four = (lowered(layers=n, pattern=(model.Block(),) * n) for n in (2, 4))
    assert len(four) > 1.2 * len(two)


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    """A start with a warm compilation cache adds no program to it."""
    cache = tmp_path / "cache"
    script = (
        "from tiny_experiments import experiment; from lm import run, program; import sys; "
        "run.train(experiment(), workdir=sys.argv[1])"
    )
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        # Else it depends on the clock which programs are kept.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": paths,
        "JAX_LOG_COMPILES": "1",
    }

    def programs() -> set[str]:
        return {p.name for p in cache.iterdir() if not p.name.endswith("-atime")}

    said = []
    for index in range(2):
        command = [sys.executable, "-c", script, str(tmp_path / str(index))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append((programs(), done.stderr))
    (cold, _), (warm, log) = said
    assert cold, "the first process cached no program"
    assert warm == cold
    assert "Persistent compilation cache hit for 'jit_on_mesh'" in log  # the training step
