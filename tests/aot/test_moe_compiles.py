"""A mixture of experts on 16 chips: its products are the TPU's kernels, forward and backward, and
rows travel to their experts by all-to-all."""

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lm import sharding
from lm.mesh import AXES
from lm.model.moe import MoE
from lm.model.param import He
from lm.plan import hlo, links, slices

pytestmark = pytest.mark.slow


def test_dropless_experts():
    shape = [{"fsdp": 2, "expert": 4, "tensor": 2}.get(axis, 1) for axis in AXES]
    devices = np.array(described.devices(described.SIXTEEN)).reshape(shape)
    mesh = jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    config = MoE(experts=8, active=2, hidden=512, balance=None)

    def build():
        return config.build(256, nnx.Rngs(params=0), He(gain=1.0).build(1))

    def loss(module, x):
        with sharding.use(mesh):
            return jnp.square(module(x)[0].astype(jnp.float32)).sum()

    everywhere = NamedSharding(mesh, PartitionSpec())
    module = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=everywhere),
        jax.eval_shape(build),
    )
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    x = jax.ShapeDtypeStruct((8, 128, 256), jnp.bfloat16, sharding=rows)
    text = jax.jit(jax.grad(loss, (0, 1))).lower(module, x).compile().as_text()
    # Three products, and for each the gradients of its rows and of its weights.
    kernels = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert sum("grouped_matmul" in line for line in kernels) >= 8
    layout = links.Layout(devices, AXES, slices.find("v5e-16"))
    moved = links.collectives(hlo.parse(text), layout)
    wide = {row.kind for row in moved if row.axes == "expert" and row.dtype == "bf16"}
    assert wide == {"all-to-all"}
    # Forward rows go and come back; backward they go anew, their gradients go, and theirs come.
    rows = 8 * 128 // 8 * config.active
    (exchange,) = (row for row in moved if row.kind == "all-to-all" and row.dtype == "bf16")
    assert (exchange.count, exchange.nbytes) == (5, 5 * rows * 256 * 2)
