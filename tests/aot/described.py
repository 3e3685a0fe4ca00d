"""Ahead-of-time compilation for TPUs by libtpu. Tests are skipped if it is not installed."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# The smallest slice of each chip, and a slice of 16 chips.
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SIXTEEN = "v5e:4x4"


@functools.cache
def devices(topology: str) -> list[Any]:
    """Returns the devices of a slice; skips the test if libtpu is not installed."""
    pytest.importorskip("libtpu")
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def on_one(chip: str, function: Callable[..., Any], *arrays: jax.ShapeDtypeStruct) -> Any:
    """Compiles `function` for one device of a chip."""
    mesh = Mesh(np.array(devices(CHIPS[chip])[:1]), ("x",))
    return _compiled(function, mesh, [PartitionSpec()] * len(arrays), arrays)


def on_sixteen(
    function: Callable[..., Any],
    in_specs: tuple[PartitionSpec, ...],
    out_specs: Any,
    *arrays: jax.ShapeDtypeStruct,
) -> Any:
    """Compiles `function` in a shard_map over the mesh (a=4, b=4) of 16 chips."""
    mesh = Mesh(
        np.array(devices(SIXTEEN)).reshape(4, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2
    )
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return _compiled(mapped, mesh, in_specs, arrays)


def _compiled(function, mesh, specs, arrays):
    sharded = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in zip(arrays, specs, strict=True)
    ]
    return jax.jit(function).lower(*sharded).compile()
