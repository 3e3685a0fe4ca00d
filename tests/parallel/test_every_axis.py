"""At every place the loss and all gradients equal those of one device: pairs and triples of mesh
axes, both pipeline schedules, packed documents.

place_runs.py runs the programs, many of them in one process with 8 virtual CPU devices.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from place_runs import RUNS, place
from test_meshes import (
    ALONE,
    EIGHT,
    ONE_STEP,
    Numbers,
    differences,
    environments,
    results,
    start,
    wait,
)

from lm.errors import UserError
from lm.planning import show

WORKER = Path(__file__).with_name("place_runs.py")

CIRCULAR = "pipe=2 circular_repeats=2 microbatches=4"
QUICK = (CIRCULAR, "context=2,pipe=2,fsdp=2 context=gather")
DENSE = (
    # pairs
    "data=2,fsdp=2",
    "data=2,tensor=2",
    "data=2,pipe=2",
    "fsdp=2,tensor=2",
    "fsdp=2,pipe=2",
    "tensor=2,pipe=2",
    "data=2,context=2",
    "context=4,data=2",
    "fsdp=2,context=2",
    "tensor=2,context=2",
    "pipe=2,context=2",
    # triples, and more pipeline settings
    "data=2,fsdp=2,pipe=2 circular_repeats=2",
    "fsdp=2,tensor=2,pipe=2",
    "pipe=2,data=2,tensor=2",
    "fsdp=2,tensor=2,pipe=2 circular_repeats=2",
    "data=2,tensor=2,context=2",
    "fsdp=2,tensor=2,context=2 context=gather",
    "pipe=2,tensor=2,context=2 circular_repeats=2 microbatches=4",
    "pipe=2,fsdp=2,context=2",
    "context=8 remat=block",
    "pipe=4 microbatches=8",
    "pipe=4,data=2 microbatches=4 remat=stage",
    "pipe=2,tensor=4 circular_repeats=2 microbatches=4 remat=block",
    "pipe=2 microbatches=8 remat=dots",
    "pipe=2,fsdp=2 circular_repeats=2 remat=attention",
)
UNEVEN = ("pipe=2", "pipe=4 microbatches=8", "pipe=2,fsdp=2,data=2 circular_repeats=2")
WORDS = (
    "fsdp=2",
    "tensor=2",
    "fsdp=2,tensor=2,data=2",
    "fsdp=2,tensor=2,context=2",
    "fsdp=2,pipe=2,tensor=2",
)
MOE = (
    "expert=2,data=2",
    "expert=2,fsdp=2",
    "expert=2,tensor=2",
    "expert=2,pipe=2",
    "expert=2,context=2",
    "expert=2,context=2,data=2 context=gather",
    "expert=2,pipe=2,data=2 circular_repeats=2",
    "expert=2,pipe=2,fsdp=2",
    "expert=2,pipe=2,tensor=2 remat=block",
    "expert=2,fsdp=2,tensor=2",
)


def at_places(folder: Path, run: str, places: tuple[str, ...]) -> dict[str, Numbers]:
    """Uses two processes, since most of the time is compilation, which runs on one core."""
    places = (ALONE, *places)
    halves = filter(None, (places[::2], places[1::2]))
    wait(*[start(folder, run, half, worker=WORKER, **EIGHT) for half in halves])
    return results(folder, places)


def check(at: Numbers, alone: Numbers) -> None:
    gradients = differences(at, alone, "gradient")
    print(
        f"loss {abs(at['loss'] / alone['loss'] - 1):.1e}, gradients {max(gradients.values()):.1e}"
    )
    assert abs(at["loss"] / alone["loss"] - 1) <= ONE_STEP
    assert max(gradients.values()) <= ONE_STEP, gradients


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict[str, Numbers]:
    return at_places(tmp_path_factory.mktemp("quick"), "dense", QUICK)


@pytest.mark.parametrize("text", QUICK)
def test_a_few_places_agree_with_one_device(quick, text):
    check(quick[text], quick[ALONE])


def test_the_displayed_bubble_matches_the_compiled_loop(quick):
    """Four microbatches pass through two stages twice, so each stage works in eight iterations."""
    changed = replace(RUNS["dense"], places={"here": place(CIRCULAR)})
    shown = show.facts(changed, "here")["pipeline"]
    trips = list(quick[CIRCULAR]["trips"])
    assert trips.count(shown["iterations"]) == 2, "expected one forward and one backward loop"
    assert shown["bubble"] == pytest.approx(1 - 4 * 2 / shown["iterations"])
    assert "9 iterations, bubble 11.1%" in show.text(show.facts(changed, "here"))


def test_invalid_places_are_refused():
    with pytest.raises(UserError, match=r"batch.length=16 must be a multiple of 24"):
        RUNS["dense"].check_place(place("context=12"))
    with pytest.raises(
        UserError, match=r"pipe=8 times place.circular_repeats=1 is more than the 4 repeats"
    ):
        RUNS["dense"].check_place(place("pipe=8"))
    with pytest.raises(UserError, match=r"cannot have both pipe and context"):
        RUNS["capacity"].check_place(place("pipe=2,context=2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "places"),
    [
        ("dense", DENSE),
        ("uneven", UNEVEN),
        ("words", WORDS),
        ("dropless", (*MOE, "expert=2,context=2,pipe=2")),
        ("capacity", MOE),
    ],
)
def test_all_places_agree_with_one_device(tmp_path, run, places):
    found = at_places(tmp_path, run, places)
    for text in places:
        check(found[text], found[ALONE])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_agree_with_one_device(tmp_path, processes):
    alone = at_places(tmp_path, "dense", ())[ALONE]
    places = ("pipe=2,data=2,tensor=2", "pipe=4,fsdp=2 microbatches=4")
    each = environments(processes)
    wait(*(start(tmp_path, "dense", places, worker=WORKER, **one) for one in each))
    for at in results(tmp_path, places).values():
        check(at, alone)
