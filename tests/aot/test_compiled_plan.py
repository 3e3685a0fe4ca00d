"""Plans through libtpu's compiler, for slices that are not there. Skipped where it is missing."""

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
    """The declaration of llama3_8b with a model that compiles in seconds."""
    return dataclasses.replace(override(llama3_8b.experiment(), SMALL), **changes)


def test_a_small_step_compiles_and_fits():
    places = {"v5p-8": Place(mesh=Mesh(fsdp=4), microbatches=2, remat="block")}
    told = planning.plan(small(places=places), "v5p-8")
    assert told["compiled"] and told["fits"]
    assert told["argument_bytes_per_device"] <= told["peak_bytes_per_device"]
    # State and batch: weights and moments in float32, and five arrays of four bytes a token.
    state = told["state_bytes_per_device"] + 5 * 4 * 32 * 256 / 4
    assert told["argument_bytes_per_device"] == pytest.approx(state, rel=1e-3)
    # Products of the compiled program: the model's, and those of a second forward pass.
    model_flops = told["model_flops_per_step"] / told["devices"]
    assert 1.0 < told["flops_per_device_per_step"] / model_flops < 2.0
    gathered = [row for row in told["collectives"] if row["kind"] == "all-gather"]
    assert gathered and all(row["axes"] == "fsdp" for row in gathered)
    assert any("state.params" in array["source"] for array in told["largest_arrays"])
    assert json.loads(json.dumps(told)) == told
    assert "all-gather" in str(told)


@pytest.mark.slow
def test_what_does_not_fit_is_told_and_by_how_much():
    places = {"v5e-4": Place(mesh=Mesh(data=4), remat="block")}
    vast = override(small(places=places), ["model.dim=8192", "model.ffn.hidden=65536"])
    told = planning.plan(vast, "v5e-4")
    assert not told["fits"]
    assert told["peak_bytes_per_device"] > told["capacity_bytes_per_device"]
    assert "does not fit by" in str(told)


@pytest.mark.slow
def test_the_hosts_memory_takes_off_the_chips():
    """The optimizer's state, fetched only for the update, and each layer's input."""
    plans = []
    for offload in ((), ("optimizer", "layers")):
        places = {"v5p-8": Place(mesh=Mesh(fsdp=4), remat="block", offload=offload)}
        larger = ["model.layers=8", "model.dim=1024", "model.ffn.hidden=2048"]
        plans.append(planning.plan(override(small(places=places), larger), "v5p-8"))
    before, after = plans
    optimizer = before["optimizer_bytes_per_device"]
    inputs = 8 * (32 * 256 / 4) * 1024 * 2
    assert after["host_bytes_per_device"] == pytest.approx(optimizer + inputs, rel=0.02)
    given = [told["argument_bytes_per_device"] for told in plans]
    assert given[0] - given[1] == pytest.approx(optimizer, rel=0.02)
    # What the update fetches counts where it is more than what activations took.
    assert after["peak_bytes_per_device"] < before["peak_bytes_per_device"] - optimizer / 4


@pytest.mark.slow
def test_a_search_compiles_the_best_and_the_declared():
    declared = Place(mesh=Mesh(fsdp=4), microbatches=2, remat="block")
    found = planning.search(small(places={"v5p-8": declared}), "v5p-8", few=1)
    assert all(each.plan["compiled"] and each.plan["fits"] for each in found)
    (own,) = (each for each in found if each.place == declared)
    assert found[0].plan["step_seconds"] <= own.plan["step_seconds"]
    assert found[0].plan["step_seconds"] <= found[-1].plan["step_seconds"]


@pytest.mark.slow
def test_the_bubble_is_that_of_the_compiled_loops():
    place = Place(
        mesh=Mesh(data=2, fsdp=2, pipe=4), microbatches=8, circular_repeats=2, remat="block"
    )
    e = override(small(places={"v5e-16": place}), ["model.layers=8"])
    program = compiled.step(e, "v5e-16", place, slices.find("v5e-16")).program
    loops = [each for each, *_ in program.executed() if each.op == "while"]
    bodies = {each: re.search(r"body=%([\w.\-]+)", each.rest).group(1) for each in loops}
    # Those through which micro-batches pass on, forward and backward.
    passing = [
        program.trips(loop)
        for loop, body in bodies.items()
        if any(i.op.startswith("collective-permute") for i in program.computations[body])
    ]
    assert len(passing) == 2 and len(set(passing)) == 1
    work = place.microbatches * place.circular_repeats
    told = planning.plan(e, "v5e-16", compile=False)
    assert told["pipeline_bubble"] == pytest.approx(1 - work / passing[0])


@pytest.mark.slow
def test_what_passes_between_slices_is_counted():
    mesh = Mesh(data=2, fsdp=4)
    told = planning.plan(small(places={"2xv5p-8": Place(mesh=mesh, remat="block")}), "2xv5p-8")
    between = [row for row in told["collectives"] if row["axes"] == "data"]
    assert between and all(row["kind"] == "all-reduce" for row in between)
    # The gradients of what is split, once, in the format of the products.
    assert sum(row["nbytes"] for row in between) >= told["gradient_bytes_per_device"] / 2
