"""Pipeline schedule: order of layer groups, bubble fraction, and errors."""

import pytest

from lm.errors import UserError
from lm.parallel.mesh import Mesh, Place
from lm.parallel.pipeline import Schedule


def schedule(layers=8, stages=2, circular_repeats=1, microbatches=4):
    return Schedule(
        layers=layers, stages=stages, circular_repeats=circular_repeats, microbatches=microbatches
    )


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("circular_repeats", [1, 2, 3])
@pytest.mark.parametrize("turns", [1, 3])
def test_every_microbatch_passes_every_layer_group_in_order(stages, circular_repeats, turns):
    """Simulates which layer group of which microbatch each stage computes in each iteration."""
    plan = schedule(
        layers=24, stages=stages, circular_repeats=circular_repeats, microbatches=turns * stages
    )
    seen: dict[int, list[int]] = {}
    busy = 0
    for step in range(plan.iterations):
        for stage in range(stages):
            turn, index = divmod((step - stage) // stages, circular_repeats)
            microbatch = turn * stages + (step - stage) % stages
            if step >= stage and microbatch < plan.microbatches:
                seen.setdefault(microbatch, []).append(index * stages + stage)
                busy += 1
    assert sorted(seen) == list(range(plan.microbatches))
    assert all(groups == list(range(stages * circular_repeats)) for groups in seen.values())
    assert plan.bubble == pytest.approx(1 - busy / (plan.iterations * stages))


def test_bubble_fraction():
    assert schedule().bubble == pytest.approx(1 / 5)  # (stages - 1) / (microbatches + stages - 1)
    assert schedule(circular_repeats=2).bubble == pytest.approx(1 / 9)
    # Five layers on two stages take the time of six layers.
    assert schedule(layers=5).bubble == pytest.approx(1 - (4 / 5) * (5 / 6))
    assert schedule(layers=5).depth == 3


def test_invalid_pipeline_schedule_raises_user_error():
    with pytest.raises(UserError, match=r"microbatches=3 must be a multiple of mesh.pipe=2"):
        schedule(microbatches=3)
    with pytest.raises(
        UserError, match=r"pipe=2 times place.circular_repeats=5 is more than the 8 repeats"
    ):
        schedule(circular_repeats=5)
    with pytest.raises(UserError, match=r"place.microbatches=1 must be a multiple of mesh.pipe=2"):
        Place(mesh=Mesh(pipe=2))
    with pytest.raises(UserError, match=r"place.circular_repeats=2 is for pipelines"):
        Place(circular_repeats=2)
    with pytest.raises(UserError, match=r"place.remat='stage' is for pipelines"):
        Place(remat="stage")
