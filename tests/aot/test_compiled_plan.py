"""Plans compiled by libtpu. Skipped if it is not installed."""

import dataclasses
import json
import re

import pytest

from experiments import llama3_8b
from lm import planning
from lm.experiment import override
from lm.parallel.mesh import Mesh, Place
from lm.planning import compiled, slices

pytestmark = pytest.mark.skipif(not compiled.available(), reason="libtpu is not installed")

SMALL = [
    "model.layers=2", "model.dim=512", "model.vocab=2048", "tokenizer.vocab=2048",
    "model.attention.heads=4", "model.attention.kv_heads=2", "model.ffn.hidden=1024",
    "batch.sequences=32", "batch.length=256",
]  # fmt: skip


def small(**changes):
    """llama3_8b with a small model that compiles in seconds."""
    return dataclasses.replace(override(llama3_8b.experiment(), SMALL), **changes)


def test_a_small_step_compiles_and_fits():
    places = {"v5p-8": Place(mesh=Mesh(fsdp=4), microbatches=2, remat="block")}
    plan = planning.plan(small(places=places), "v5p-8")
    assert plan["compiled"] and plan["fits"]
    assert plan["argument_bytes_per_device"] <= plan["peak_bytes_per_device"]
    # State (float32 weights and moments) and batch (five arrays of four bytes per token).
    state = plan["state_bytes_per_device"] + 5 * 4 * 32 * 256 / 4
    assert plan["argument_bytes_per_device"] == pytest.approx(state, rel=1e-3)
    # Matmuls of the compiled program: those of the model and of a recomputed forward pass.
    model_flops = plan["model_flops_per_step"] / plan["devices"]
    assert 1.0 < plan["flops_per_device_per_step"] / model_flops < 2.0
    all_gathers = [row for row in plan["collectives"] if row["kind"] == "all-gather"]
    assert all_gathers and all(row["axes"] == "fsdp" for row in all_gathers)
    assert any("state.params" in array["source"] for array in plan["largest_arrays"])
    assert json.loads(json.dumps(plan)) == plan
    assert "all-gather" in str(plan)


@pytest.mark.slow
def test_a_plan_that_does_not_fit_says_by_how_much():
    places = {"v5e-4": Place(mesh=Mesh(data=4), remat="block")}
    large = override(small(places=places), ["model.dim=8192", "model.ffn.hidden=65536"])
    plan = planning.plan(large, "v5e-4")
    assert not plan["fits"]
    assert plan["peak_bytes_per_device"] > plan["capacity_bytes_per_device"]
    assert "does not fit by" in str(plan)


@pytest.mark.slow
def test_offloading_moves_memory_to_the_host():
    """Offloads the optimizer state, which only the update fetches, and the input of each layer."""
    plans = []
    for offload in ((), ("optimizer", "layers")):
        places = {"v5p-8": Place(mesh=Mesh(fsdp=4), remat="block", offload=offload)}
        larger = ["model.layers=8", "model.dim=1024", "model.ffn.hidden=2048"]
        plans.append(planning.plan(override(small(places=places), larger), "v5p-8"))
    before, after = plans
    optimizer = before["optimizer_bytes_per_device"]
    inputs = 8 * (32 * 256 / 4) * 1024 * 2
    assert after["host_bytes_per_device"] == pytest.approx(optimizer + inputs, rel=0.02)
    arguments = [plan["argument_bytes_per_device"] for plan in plans]
    assert arguments[0] - arguments[1] == pytest.approx(optimizer, rel=0.02)
    # State fetched by the update adds to the peak only where it exceeds the activations.
    assert after["peak_bytes_per_device"] < before["peak_bytes_per_device"] - optimizer / 4


@pytest.mark.slow
def test_a_search_compiles_the_best_and_the_declared_place():
    declared = Place(mesh=Mesh(fsdp=4), microbatches=2, remat="block")
    candidates = planning.search(small(places={"v5p-8": declared}), "v5p-8", count=1)
    assert all(each.plan["compiled"] and each.plan["fits"] for each in candidates)
    (own,) = (each for each in candidates if each.place == declared)
    assert candidates[0].plan["step_seconds"] <= own.plan["step_seconds"]
    assert candidates[0].plan["step_seconds"] <= candidates[-1].plan["step_seconds"]


@pytest.mark.slow
def test_the_pipeline_bubble_matches_the_compiled_loops():
    place = Place(
        mesh=Mesh(data=2, fsdp=2, pipe=4), microbatches=8, circular_repeats=2, remat="block"
    )
    e = override(small(places={"v5e-16": place}), ["model.layers=8"])
    program = compiled.step(e, "v5e-16", place, slices.find("v5e-16")).program
    loops = [each for each, *_ in program.executed() if each.op == "while"]
    bodies = {each: re.search(r"body=%([\w.\-]+)", each.rest).group(1) for each in loops}
    # The loops that send microbatches to the next stage, forward and backward.
    trip_counts = [
        program.trips(loop)
        for loop, body in bodies.items()
        if any(i.op.startswith("collective-permute") for i in program.computations[body])
    ]
    assert len(trip_counts) == 2 and len(set(trip_counts)) == 1
    work = place.microbatches * place.circular_repeats
    plan = planning.plan(e, "v5e-16", compile=False)
    assert plan["pipeline_bubble"] == pytest.approx(1 - work / trip_counts[0])


@pytest.mark.slow
def test_collectives_between_slices_are_counted():
    mesh = Mesh(data=2, fsdp=4)
    plan = planning.plan(small(places={"2xv5p-8": Place(mesh=mesh, remat="block")}), "2xv5p-8")
    between = [row for row in plan["collectives"] if row["axes"] == "data"]
    assert between and all(row["kind"] == "all-reduce" for row in between)
    # The gradients of sharded weights, once, in the compute dtype.
    assert sum(row["nbytes"] for row in between) >= plan["gradient_bytes_per_device"] / 2
