"""Plans without the compiler: errors before compilation, and properties of estimates."""

import dataclasses
import json

import pytest

import lm
from experiments import llama3_8b, long_context_8b, mixtral_8x7b
from lm import model, planning
from lm.errors import UserError
from lm.parallel.mesh import Mesh, Place
from lm.planning import compiled, show, slices
from lm.planning.estimate import estimate

LLAMA, MIXTRAL = llama3_8b.experiment(), mixtral_8x7b.experiment()
LONG = long_context_8b.experiment()


@pytest.mark.parametrize(
    ("on", "mesh", "message"),
    [
        ("v5p-65", None, "there is no such slice"),
        ("laptop", None, "is not a supported TPU slice; examples: v5e-256"),
        ("v5p-16", None, "add a mesh, as in --mesh fsdp=8"),
        ("v5p-64", Mesh(fsdp=16), "has 16 devices and v5p-64 (v5p:2x4x4) has 32"),
        ("tpu7x-8", Mesh(fsdp=4), "has 8, 2 per chip"),
        ("v5p-128", Mesh(tensor=64), "does not divide"),
        ("v5p-6144", Mesh(fsdp=3072), "batch.sequences=1024 must be a multiple of"),
    ],
)
def test_an_invalid_place_is_an_error_before_compilation(on, mesh, message, monkeypatch):
    monkeypatch.setattr(compiled, "step", lambda *_: pytest.fail("compiled"))
    with pytest.raises(UserError) as error:
        planning.plan(LLAMA, on, mesh=mesh)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_without_the_compiler_a_plan_is_an_estimate(monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda: False)
    plan = lm.plan(LLAMA, on="v5p-64")
    assert plan["compiled"] is False and plan["collectives"] is None
    assert "libtpu" in str(plan) and plan["fits"]
    assert json.loads(json.dumps(plan)) == plan


def test_a_plan_has_the_documented_keys():
    plan = planning.plan(LLAMA, "v5p-64", compile=False, price=2.0)
    keys = {
        "peak_bytes_per_device", "state_bytes_per_device", "temp_bytes_per_device",
        "capacity_bytes_per_device", "fits", "model_flops_per_step", "collectives",
        "step_seconds", "model_flops_utilization", "compile_seconds",
    }  # fmt: skip
    assert keys <= plan.keys()
    assert plan["cost"] == pytest.approx(2 * plan["chip_hours"])
    seconds = plan["step_seconds"] * plan["chips"] * slices.find("v5p-64").chip.flops
    assert plan["model_flops_utilization"] == pytest.approx(plan["model_flops_per_step"] / seconds)


def test_state_size_agrees_with_show():
    shown = show.facts(LLAMA, on="v5p-64")["memory_bytes_per_device"]
    plan = planning.plan(LLAMA, "v5p-64", compile=False)
    assert plan["state_bytes_per_device"] == shown["parameters"] + shown["optimizer"]


@pytest.mark.parametrize("e", [LLAMA, MIXTRAL, LONG], ids=lambda e: e.name)
def test_every_declared_place_is_a_slice_and_fits_by_estimate(e):
    for name in e.places:
        plan = planning.plan(e, name, compile=False)
        assert plan["fits"], name
        assert 0.05 < plan["model_flops_utilization"] < 0.9


def test_more_activation_checkpointing_uses_less_memory_and_takes_longer():
    tpu_slice = slices.find("v5p-64")
    none, dots, block = (
        estimate(LLAMA, Place(mesh=Mesh(fsdp=32), remat=remat), tpu_slice)
        for remat in ("none", "dots", "block")
    )
    assert none.activations > dots.activations > block.activations
    assert block.seconds > dots.seconds


def test_activation_memory_depends_only_on_work_per_chip():
    small = dataclasses.replace(LLAMA, batch=dataclasses.replace(LLAMA.batch, sequences=128))
    a = estimate(small, Place(mesh=Mesh(fsdp=32), remat="block"), slices.find("v5p-64"))
    b = estimate(LLAMA, Place(mesh=Mesh(fsdp=256), remat="block"), slices.find("v5p-512"))
    assert a.activations == b.activations
    # Norms are replicated.
    assert a.state == pytest.approx(8 * b.state, rel=1e-2)


def test_a_step_takes_at_least_the_time_of_its_matmuls():
    tpu_slice = slices.find("v5p-64")
    estimated = estimate(LLAMA, LLAMA.places["v5p-64"], tpu_slice)
    tokens = LLAMA.batch.sequences * LLAMA.batch.length / tpu_slice.chips
    at_peak = model.train_flops(LLAMA.model, LLAMA.batch.length) * tokens / tpu_slice.chip.flops
    assert estimated.seconds > at_peak


def on_v5p_64(place):
    return estimate(LLAMA, place, slices.find("v5p-64"))


def test_the_pipeline_bubble_matches_the_schedule():
    mesh = Mesh(fsdp=8, pipe=4)
    plain, gpipe, circular = (
        on_v5p_64(
            Place(mesh=mesh, microbatches=8, circular_repeats=circular_repeats, remat="block")
        )
        if circular_repeats
        else on_v5p_64(Place(mesh=Mesh(fsdp=32), microbatches=8, remat="block"))
        for circular_repeats in (0, 1, 2)
    )
    assert (plain.bubble, gpipe.bubble) == (0, pytest.approx(3 / 11))
    assert circular.bubble == pytest.approx(3 / 19)
    assert circular.seconds < gpipe.seconds
    # The matmuls are the same; the bubble applies only to those in layers.
    assert gpipe.compute == pytest.approx(plain.compute, rel=0.02)
    assert gpipe.seconds > gpipe.compute + gpipe.layers * 3 / 8
    # 32 layers in 12 groups: the last group has fewer layers and waits for the others.
    uneven = on_v5p_64(Place(mesh=mesh, microbatches=8, circular_repeats=3, remat="block"))
    assert uneven.bubble == pytest.approx(1 - 8 * 32 / (4 * 27 * 3))


def test_circular_repeats_do_not_change_the_state_size():
    # With circular_repeats, pipe shards the model width instead of the layers; bytes are equal.
    one, two = (
        on_v5p_64(
            Place(
                mesh=Mesh(fsdp=8, pipe=4),
                microbatches=8,
                circular_repeats=circular_repeats,
                remat="block",
            )
        )
        for circular_repeats in (1, 2)
    )
    assert one.state == pytest.approx(two.state, rel=1e-3)


def test_the_network_between_slices_is_slower():
    mesh, one, four = Mesh(data=4, fsdp=32), slices.find("v5p-256"), slices.find("4xv5p-64")
    assert one.devices == four.devices == 128
    place = Place(mesh=mesh, remat="block")
    within, between = estimate(LLAMA, place, one), estimate(LLAMA, place, four)
    assert between.compute == within.compute
    # All-reduce: each chip sends and receives 3/4 of its gradients, twice.
    network = 2 * between.gradients * 3 / 4 / four.chip.network
    assert between.links > network > within.links / 2
    plan = planning.plan(LLAMA, "4xv5p-64", mesh=mesh, compile=False)
    assert plan["chips"] == 128 and "(4 x v5p:2x4x4)" in str(plan)


def test_a_longer_ring_sends_more_and_uses_the_same_memory():
    short, long = (
        estimate(LONG, Place(mesh=mesh, remat="block"), slices.find("v5p-64"))
        for mesh in (Mesh(data=2, fsdp=4, context=4), Mesh(fsdp=4, context=8))
    )
    assert (short.state, short.activations) == (long.state, long.activations)
    assert 0 < short.exposed < long.exposed


def test_a_search_without_the_compiler_ranks_by_estimate():
    candidates = planning.search(LLAMA, "v5p-64", compile=False)
    seconds = [each.plan["step_seconds"] for each in candidates]
    assert seconds == sorted(seconds)
    assert LLAMA.places["v5p-64"] in [each.place for each in candidates]
    place = eval(candidates[0].code, {"Place": Place, "Mesh": Mesh})
    assert place == candidates[0].place and place.mesh.size == 32
    assert candidates[0].code in planning.search_text(candidates)


def test_an_unsupported_mesh_quotes_the_compiler_in_one_line():
    error = Exception("INTERNAL: RET_CHECK failure (a/b.cc:325) ragged: not supported\nmore")
    message = str(compiled._unsupported(error, "mesh expert=4 on v5e:2x2"))
    assert "mesh expert=4 on v5e:2x2" in message and "not supported" in message
    assert "\n" not in message and ".cc" not in message
