"""On four devices, in a process of its own: attention over batch and heads needs no communication,
and both kernels give what one device gives."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import re

import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import kernels_pallas

grid = np.array(jax.devices()).reshape(2, 2)
mesh = jax.sharding.Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def compare(function, arrays, specs):
    gradient = jax.grad(function, (0, 1))
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    options = {"in_shardings": shardings, "out_shardings": tuple(shardings[:2])}
    compiled = jax.jit(gradient, **options).lower(*arrays).compile()
    got = compiled(*(jax.device_put(x, s) for x, s in zip(arrays, shardings)))
    for a, b in zip(got, jax.jit(gradient)(*arrays)):
        # Sums over two devices, in float32 and another order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    return re.findall(r"(all-\\w+|collective-permute|reduce-scatter)\\(", compiled.as_text())


keys = jax.random.split(jax.random.key(0), 5)
q, k, v = (jax.random.normal(key, (4, 128, n, 8)) for key, n in zip(keys, (4, 2, 2)))
segments = jnp.ones((4, 128), jnp.int32)


def attend(q, k, v, segments):
    return jnp.sum(kernels_pallas.flash_attention(q, k, v, segment_ids=segments) ** 2)


heads = P("data", None, "tensor", None)
assert compare(attend, (q, k, v, segments), (heads, heads, heads, P("data"))) == []



@jax.shard_map(mesh=mesh, in_specs=(heads, heads, heads, P("data"), P("tensor")), out_specs=heads)
def local(q, k, v, segments, sinks):
    options = {"segment_ids": segments, "sinks": sinks, "return_lse": True}
    out, lse = kernels_pallas.flash_attention(q, k, v, **options)
    return out * lse[..., None]


def whole(q, k, v, segments, sinks):
    options = {"segment_ids": segments, "sinks": sinks, "return_lse": True}
    out, lse = kernels_pallas.flash_attention(q, k, v, **options)
    return out * lse[..., None]


arrays = q, k, v, segments, jnp.ones(4)
for function in (local, whole):
    gradients = jax.jit(jax.grad(lambda *a: jnp.sum(function(*a)), (0, 1, 2, 4)))(*arrays)
    if function is local:
        expected = gradients
for a, b in zip(gradients, expected):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

x, w = jax.random.normal(keys[3], (4, 128, 16)), jax.random.normal(keys[4], (16, 64))


def cross_entropy(x, w, targets, weights):
    return kernels_pallas.cross_entropy(x, w, targets, weights, chunk=32)[0]


for spec in (P(None, "tensor"), P("data", None), P("data", "tensor")):
    arrays = x, w, segments, jnp.ones((4, 128))
    compare(cross_entropy, arrays, (P("data"), spec, P("data"), P("data")))

# The vocabulary divided by hand: statistics of tokens are exchanged, and no logits.
for options in ({}, {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.2}):

    def local(x, w, targets, weights):
        call = {"chunk": 32, "vocab_axis": "tensor", **options}
        loss, nll = kernels_pallas.cross_entropy(x, w, targets, weights, **call)
        return jax.lax.psum((loss, nll), "data")

    specs = P("data"), P(None, "tensor"), P("data"), P("data")
    divided = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    targets = jax.random.randint(keys[2], (4, 128), 0, 64)
    weights = jax.random.uniform(keys[2], (4, 128))
    forms = divided, lambda *a: kernels_pallas.cross_entropy(*a, **options)
    one, other = (
        jax.jit(jax.value_and_grad(form, (0, 1, 3), has_aux=True))(x, w, targets, weights)
        for form in forms
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    program = jax.jit(jax.grad(lambda *a: divided(*a)[0], (0, 1))).lower(x, w, targets, weights)
    assert "all-gather" not in program.compile().as_text()

# The rows divided too, between devices with tokens of their own.
for chunks in ({"chunk": 32}, {"chunk": 32, "vocab_chunk": 10}):

    def local(x, w, targets, weights):
        call = {"vocab_axis": "tensor", "embed_axes": ("data",), "z_loss": 0.1, **chunks}
        return jax.lax.psum(kernels_pallas.cross_entropy(x, w, targets, weights, **call), "data")

    specs = P("data"), P("data", "tensor"), P("data"), P("data")
    divided = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    forms = divided, lambda *a: kernels_pallas.cross_entropy(*a, z_loss=0.1)
    one, other = (
        jax.jit(jax.value_and_grad(form, (0, 1, 3), has_aux=True))(x, w, targets, weights)
        for form in forms
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.slow
def test_four_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True, timeout=300)
