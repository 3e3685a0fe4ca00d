"""Sequence parallelism: between layers the tensor axis shards the sequence, so that activations are
reduce-scattered and all-gathered instead of all-reduced."""

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lm import model
from lm.parallel import sharding
from lm.parallel.mesh import AXES
from lm.planning import hlo, links, slices

pytestmark = pytest.mark.slow


def test_activations_are_reduce_scattered_along_the_sequence():
    shape = [{"fsdp": 4, "tensor": 4}.get(axis, 1) for axis in AXES]
    devices = np.array(described.devices(described.SIXTEEN)).reshape(shape)
    mesh = jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    config = model.Config(
        vocab=512,
        dim=512,
        layers=2,
        attention=model.GQA(heads=8, kv_heads=4, head_dim=64),
        ffn=model.SwiGLU(hidden=1024),
    )
    shardings = sharding.weight_shardings(model.axes(config), model.shapes(config), mesh)
    params = jax.tree.map(
        lambda a, at: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=at),
        model.shapes(config),
        shardings,
    )
    tokens = jax.ShapeDtypeStruct((8, 512), jnp.int32, sharding=sharding.batch_sharding(mesh))

    def loss(params, tokens):
        with sharding.use(mesh):
            options = model.ForwardOptions(remat="block")
            hidden = model.Model(config, params, options=options)(tokens).hidden_btd
        return jnp.square(hidden.astype(jnp.float32)).sum()

    text = jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()
    layout = links.Layout(devices, AXES, slices.find("v5e-16"))
    rows = links.collectives(hlo.parse(text), layout)
    moved = {row.kind: row for row in rows if (row.axes, row.dtype) == ("tensor", "bf16")}
    stream = 2 * 512 * 512 * 2  # bytes of a device's rows
    # Two layers, each twice forward and twice backward.
    assert moved["reduce-scatter"].nbytes >= 8 * stream / 4
    assert moved["all-gather"].nbytes >= 8 * stream
    assert "all-reduce" not in moved or moved["all-reduce"].nbytes < stream
