"""Slices have the names and shapes of Google Cloud."""

import pytest

from lm.errors import UserError
from lm.planning import slices


@pytest.mark.parametrize(
    ("name", "topology", "chips", "devices"),
    [
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("v5p-64", "v5p:2x4x4", 32, 32),
        ("v5p-512", "v5p:4x8x8", 256, 256),
        ("v5p-12288", "v5p:16x16x24", 6144, 6144),
        ("v5e-8", "v5e:2x4", 8, 8),
        ("v5e-256", "v5e:16x16", 256, 256),
        ("v6e-128", "v6e:8x16", 128, 128),
        ("tpu7x-8", "tpu7x:2x2x1", 4, 8),
        ("tpu7x-128", "tpu7x:4x4x4", 64, 128),
        ("4xv5e-16", "v5e:4x4", 64, 64),
        ("2xtpu7x-8", "tpu7x:2x2x1", 8, 16),
    ],
)
def test_a_slice_name_gives_its_torus_and_chip_count(name, topology, chips, devices):
    tpu_slice = slices.find(name)
    assert (tpu_slice.topology, tpu_slice.chips, tpu_slice.devices) == (topology, chips, devices)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p-63", "The nearest is v5p-64."),
        ("0xv5p-64", "there is no such slice"),
        ("v5e-512", "The nearest is v5e-256."),
        ("v5p-100", "cores, two per chip"),
        ("cpu", "is not a supported TPU slice; examples: v5e-256"),
        ("v4-8", "is not a supported TPU slice; examples: v5e-256"),
    ],
)
def test_unknown_names_are_one_line_errors(name, message):
    with pytest.raises(UserError) as error:
        slices.find(name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_wraparound_links_match_google_cloud():
    assert slices.find("v5p-128").rings() == (True, True, True)
    assert slices.find("v5p-64").rings() == (False, True, True)
    assert slices.find("v5e-256").rings() == (True, True)
    assert slices.find("v5e-64").rings() == (False, False)
