"""Plans without the compiler: what is refused before anything is compiled, and what an estimate has
to obey."""

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
    ("on", "mesh", "says"),
    [
        ("v5p-65", None, "there is no such slice"),
        ("laptop", None, "name one as in v5e-256"),
        ("v5p-16", None, "give it a mesh, as in --mesh fsdp=8"),
        ("v5p-64", Mesh(fsdp=16), "has 16 devices and v5p-64 (v5p:2x4x4) has 32"),
        ("tpu7x-8", Mesh(fsdp=4), "has 8, 2 to a chip"),
        ("v5p-128", Mesh(tensor=64), "does not divide"),
        ("v5p-6144", Mesh(fsdp=3072), "batch.sequences=1024 must be a multiple of"),
    ],
)
def test_what_can_not_be_is_refused_in_one_sentence(on, mesh, says, monkeypatch):
    monkeypatch.setattr(compiled, "step", lambda *_: pytest.fail("compiled"))
    with pytest.raises(UserError) as refusal:
        planning.plan(LLAMA, on, mesh=mesh)
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def test_without_the_compiler_the_estimate_remains_and_says_so(monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda: False)
    told = lm.planning(LLAMA, on="v5p-64")
    assert told["compiled"] is False and told["collectives"] is None
    assert "libtpu" in str(told) and told["fits"]
    assert json.loads(json.dumps(told)) == told


def test_a_plan_has_the_keys_that_were_promised():
    told = planning.plan(LLAMA, "v5p-64", compile=False, price=2.0)
    promised = {
        "peak_bytes_per_device", "state_bytes_per_device", "temp_bytes_per_device",
        "capacity_bytes_per_device", "fits", "model_flops_per_step", "collectives",
        "step_seconds", "model_flops_utilization", "compile_seconds",
    }  # fmt: skip
    assert promised <= told.keys()
    assert told["cost"] == pytest.approx(2 * told["chip_hours"])
    seconds = told["step_seconds"] * told["chips"] * slices.find("v5p-64").chip.flops
    assert told["model_flops_utilization"] == pytest.approx(told["model_flops_per_step"] / seconds)


def test_state_is_what_show_says():
    shown = show.facts(LLAMA, on="v5p-64")["memory_bytes_per_device"]
    told = planning.plan(LLAMA, "v5p-64", compile=False)
    assert told["state_bytes_per_device"] == shown["parameters"] + shown["optimizer"]


@pytest.mark.parametrize("e", [LLAMA, MIXTRAL, LONG], ids=lambda e: e.name)
def test_every_declared_place_is_a_slice_and_fits_by_estimate(e):
    for name in e.places:
        told = planning.plan(e, name, compile=False)
        assert told["fits"], name
        assert 0.05 < told["model_flops_utilization"] < 0.9


def test_more_remat_keeps_less_and_takes_longer():
    where = slices.find("v5p-64")
    none, dots, block = (
        estimate(LLAMA, Place(mesh=Mesh(fsdp=32), remat=remat), where)
        for remat in ("none", "dots", "block")
    )
    assert none.activations > dots.activations > block.activations
    assert block.seconds > dots.seconds


def test_fixed_work_per_chip_takes_the_same_memory_for_activations():
    small = dataclasses.replace(LLAMA, batch=dataclasses.replace(LLAMA.batch, sequences=128))
    a = estimate(small, Place(mesh=Mesh(fsdp=32), remat="block"), slices.find("v5p-64"))
    b = estimate(LLAMA, Place(mesh=Mesh(fsdp=256), remat="block"), slices.find("v5p-512"))
    assert a.activations == b.activations
    # Norms, which every device keeps whole, are the rest.
    assert a.state == pytest.approx(8 * b.state, rel=1e-2)


def test_a_step_takes_at_least_its_products():
    where = slices.find("v5p-64")
    guess = estimate(LLAMA, LLAMA.places["v5p-64"], where)
    tokens = LLAMA.batch.sequences * LLAMA.batch.length / where.chips
    least = model.train_flops(LLAMA.model, LLAMA.batch.length) * tokens / where.chip.flops
    assert guess.seconds > least


def on_v5p_64(place):
    return estimate(LLAMA, place, slices.find("v5p-64"))


def test_a_pipeline_waits_as_long_as_its_schedule_says():
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
    # The same products, of which the stages wait for those in layers.
    assert gpipe.compute == pytest.approx(plain.compute, rel=0.02)
    assert gpipe.seconds > gpipe.compute + gpipe.layers * 3 / 8
    # 32 layers in 12 groups: the last one is short, and waits for the others.
    uneven = on_v5p_64(Place(mesh=mesh, microbatches=8, circular_repeats=3, remat="block"))
    assert uneven.bubble == pytest.approx(1 - 8 * 32 / (4 * 27 * 3))


def test_state_follows_the_rules_of_the_place():
    # Several circular_repeats keep the layers together and split their width instead: as much for a device.
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


def test_slices_are_joined_by_a_slower_network():
    mesh, one, four = Mesh(data=4, fsdp=32), slices.find("v5p-256"), slices.find("4xv5p-64")
    assert one.devices == four.devices == 128
    place = Place(mesh=mesh, remat="block")
    within, between = estimate(LLAMA, place, one), estimate(LLAMA, place, four)
    assert between.compute == within.compute
    # Each chip sends and receives 3 of 4 parts of its gradients, there and back.
    network = 2 * between.gradients * 3 / 4 / four.chip.network
    assert between.links > network > within.links / 2
    told = planning.plan(LLAMA, "4xv5p-64", mesh=mesh, compile=False)
    assert told["chips"] == 128 and "(4 x v5p:2x4x4)" in str(told)


def test_a_longer_ring_sends_more_and_keeps_as_much():
    short, long = (
        estimate(LONG, Place(mesh=mesh, remat="block"), slices.find("v5p-64"))
        for mesh in (Mesh(data=2, fsdp=4, context=4), Mesh(fsdp=4, context=8))
    )
    assert (short.state, short.activations) == (long.state, long.activations)
    assert 0 < short.exposed < long.exposed


def test_a_search_without_the_compiler_ranks_what_fits():
    found = planning.search(LLAMA, "v5p-64", compile=False)
    seconds = [each.plan["step_seconds"] for each in found]
    assert seconds == sorted(seconds)
    assert LLAMA.places["v5p-64"] in [each.place for each in found]
    place = eval(found[0].code, {"Place": Place, "Mesh": Mesh})
    assert place == found[0].place and place.mesh.size == 32
    assert found[0].code in planning.search_text(found)


def test_what_the_compiler_can_not_do_is_told_in_one_sentence():
    said = Exception("INTERNAL: RET_CHECK failure (a/b.cc:325) ragged: not supported\nmore")
    place, where = Place(mesh=Mesh(expert=4)), slices.find("v5e-4")
    refusal = str(compiled._not_compiled(said, place, where))
    assert "mesh expert=4 on v5e:2x2" in refusal and "not supported" in refusal
    assert "\n" not in refusal and ".cc" not in refusal
