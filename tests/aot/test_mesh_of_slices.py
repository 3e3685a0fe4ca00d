"""Multi-slice meshes: the first axes are split over slices, connected by a slow network."""

import pytest
from described import devices
from jax.experimental import topologies

from lm.errors import UserError
from lm.parallel.mesh import Mesh


@pytest.fixture(scope="module")
def two_slices():
    devices("v5e:4x4")  # skips without libtpu; sets its environment variables
    return topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:4x4", num_slices=2
    ).devices


@pytest.mark.parametrize(
    ("mesh", "split"),
    [
        (Mesh(data=2, fsdp=4, tensor=4), "data"),
        (Mesh(pipe=2, data=2, fsdp=8), "pipe"),
        (Mesh(fsdp=32), "fsdp"),
    ],
)
def test_slices_are_split_by_the_first_axis(two_slices, mesh, split):
    built = mesh.build(two_slices)
    axis = built.axis_names.index(split)
    for side in (0, 1):
        half = built.devices.take(
            range(side * built.shape[split] // 2, (side + 1) * built.shape[split] // 2), axis
        )
        assert {device.slice_index for device in half.flat} == {side}


def test_the_leading_axes_must_divide_over_slices():
    assert Mesh(pipe=2, data=6, tensor=4).across(4) == (2, 2, 1, 1, 1, 1)
    with pytest.raises(
        UserError, match=r"does not divide over 4 slices; choose mesh.data or mesh.pipe"
    ):
        Mesh(data=2, fsdp=3).across(4)
