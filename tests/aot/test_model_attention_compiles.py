"""The gradients of a model compile for 16 chips, with attention kernels on the rows and heads of
each device. Without activation checkpointing each kernel runs once."""

import re

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm import model
from lm.parallel import sharding
from lm.parallel.mesh import AXES, Mesh


@pytest.mark.slow
def test_fsdp_and_tensor_parallelism_run_each_kernel_once():
    layout = Mesh(fsdp=4, tensor=4)
    devices = np.array(described.devices("v5e:4x4")).reshape(layout.shape)
    mesh = jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    # Fewer key/value heads than tensor devices: each device uses the one it needs.
    attention = model.GQA(heads=8, kv_heads=2, head_dim=128)
    config = model.Config(
        vocab=512, dim=512, layers=4, attention=attention, ffn=model.SwiGLU(hidden=512)
    )

    def loss(params, tokens, segments):
        with sharding.use(mesh):
            params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
            out = model.Model(config, params)(tokens, segments_bt=segments)
            return jnp.sum(out.hidden_btd.astype(jnp.float32) ** 2)

    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    shardings = sharding.weight_shardings(model.axes(config), shapes, mesh)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    rows = NamedSharding(mesh, P("fsdp"))
    tokens = jax.ShapeDtypeStruct((8, 512), jnp.int32, sharding=rows)
    text = jax.jit(jax.grad(loss)).lower(params, tokens, tokens).compile().as_text()
    for way in ("forward", "backward"):
        assert len(re.findall(rf"%flash_attention_{way}\S* = ", text)) == 1
