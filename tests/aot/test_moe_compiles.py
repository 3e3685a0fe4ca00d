"""Mixture of experts on 16 chips: grouped matmul kernels, forward and backward, and expert
parallelism by all-to-all."""

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lm.model.initializers import He
from lm.model.moe import MoE
from lm.parallel import sharding
from lm.parallel.mesh import AXES
from lm.planning import hlo, links, slices

pytestmark = pytest.mark.slow


CONFIG = MoE(experts=8, experts_per_token=2, hidden=512, balance=None)


def compiled(topology, where, **sizes):
    """Returns (text, collectives) of both gradients, for 128 tokens of width 256 per device."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    devices = np.array(described.devices(topology)).reshape(shape)
    mesh = jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def build():
        return CONFIG.build(256, nnx.Rngs(params=0), He(gain=1.0).build(1))

    def loss(module, x):
        with sharding.use(mesh):
            return jnp.square(module(x)[0].astype(jnp.float32)).sum()

    everywhere = NamedSharding(mesh, PartitionSpec())
    module = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=everywhere),
        jax.eval_shape(build),
    )
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    batch = sizes["fsdp"] * sizes["expert"]
    x = jax.ShapeDtypeStruct((batch, 128, 256), jnp.bfloat16, sharding=rows)
    text = jax.jit(jax.grad(loss, (0, 1))).lower(module, x).compile().as_text()
    return text, links.collectives(hlo.parse(text), links.Layout(devices, AXES, slices.find(where)))


def test_dropless_experts_use_grouped_matmuls_and_all_to_all():
    text, moved = compiled(described.SIXTEEN, "v5e-16", fsdp=2, expert=4, tensor=2)
    # Three matmuls, each with gradients of its rows and weights.
    kernels = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert sum("grouped_matmul" in line for line in kernels) >= 8
    wide = {row.kind for row in moved if row.axes == "expert" and row.dtype == "bf16"}
    assert wide == {"all-to-all"}
    # Forward: rows to experts and back. Backward: rows and gradients to experts, gradients back.
    rows = 128 * CONFIG.experts_per_token
    (exchange,) = (row for row in moved if row.kind == "all-to-all" and row.dtype == "bf16")
    assert (exchange.count, exchange.nbytes) == (5, 5 * rows * 256 * 2)


def test_rows_are_all_gathered_without_ragged_all_to_all():
    """The compiler does not support ragged all-to-all on larger slices of v5e."""
    _, moved = compiled("v5e:4x8", "v5e-32", fsdp=8, expert=4)
    kinds = {row.kind for row in moved if row.axes == "expert" and row.dtype == "bf16"}
    assert "all-gather" in kinds and "all-to-all" not in kinds
