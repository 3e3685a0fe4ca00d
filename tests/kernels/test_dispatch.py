"""Selection of a kernel's implementation by platform."""

import jax
import numpy as np
import pytest

from kernels_pallas import dispatch
from lm.parallel import Mesh, sharding

X = np.ones(3, np.float32)


def traced() -> list[str]:
    """Names of the implementations that lowering for the CPU traces, in alphabetical order."""
    names = []

    def form(name: str):
        def call(x):
            names.append(name)
            return x + 1

        return call

    forms = {name: form(name) for name in ("reference", "tpu", "cpu")}
    jax.jit(lambda x: dispatch.on_platform(None, x, **forms)).lower(X)
    return sorted(names)


def test_every_platform_is_traced_by_default():
    assert traced() == ["cpu", "reference", "tpu"]


@pytest.mark.parametrize(
    ("platform", "name"), [("cpu", "cpu"), ("tpu", "tpu"), ("cuda", "reference")]
)
def test_only_traces_the_implementation_of_one_platform(platform, name):
    with dispatch.only(platform):
        assert traced() == [name]
        with dispatch.only(None):
            assert len(traced()) == 3
        assert traced() == [name]
    assert len(traced()) == 3


def test_a_mesh_of_cpus_traces_for_the_cpu():
    with sharding.use(Mesh().build()):
        assert traced() == ["cpu"]
