"""Attention and cross-entropy on four virtual devices equal those on one device; attention sharded
over batch and heads needs no communication. Runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import virtual_devices

ROOT = Path(__file__).parents[2]

SCRIPT = """
import re

import jax, jax.numpy as jnp, numpy as np
import tolerance
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import kernels_pallas

grid = np.array(jax.devices()).reshape(2, 2)
mesh = jax.sharding.Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def check(a, b):
    # Sums over at most 512 tokens, 128 keys or 64 logits; scores and logits are below 20.
    atol = tolerance.of_chain(b, 512, 128, 64, 16 * 20**2)
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def compare(function, arrays, specs):
    gradient = jax.grad(function, (0, 1))
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    options = {"in_shardings": shardings, "out_shardings": tuple(shardings[:2])}
    compiled = jax.jit(gradient, **options).lower(*arrays).compile()
    got = compiled(*(jax.device_put(x, s) for x, s in zip(arrays, shardings)))
    for a, b in zip(got, jax.jit(gradient)(*arrays)):
        check(a, b)
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
    check(a, b)

x, w = jax.random.normal(keys[3], (4, 128, 16)), jax.random.normal(keys[4], (16, 64))


def cross_entropy(x, w, targets, weights):
    return kernels_pallas.cross_entropy(x, w, targets, weights, chunk=32)[0]


for spec in (P(None, "tensor"), P("data", None), P("data", "tensor")):
    arrays = x, w, segments, jnp.ones((4, 128))
    compare(cross_entropy, arrays, (P("data"), spec, P("data"), P("data")))

# The vocabulary sharded by vocab_axis: devices exchange statistics of tokens, but no logits.
for options in ({}, {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.2}):

    def local(x, w, targets, weights):
        call = {"chunk": 32, "vocab_axis": "tensor", **options}
        loss, nll = kernels_pallas.cross_entropy(x, w, targets, weights, **call)
        return jax.lax.psum((loss, nll), "data")

    specs = P("data"), P(None, "tensor"), P("data"), P("data")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    targets = jax.random.randint(keys[2], (4, 128), 0, 64)
    weights = jax.random.uniform(keys[2], (4, 128))
    forms = sharded, lambda *a: kernels_pallas.cross_entropy(*a, **options)
    one, other = (
        jax.jit(jax.value_and_grad(form, (0, 1, 3), has_aux=True))(x, w, targets, weights)
        for form in forms
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        check(a, b)
    program = jax.jit(jax.grad(lambda *a: sharded(*a)[0], (0, 1))).lower(x, w, targets, weights)
    assert "all-gather" not in program.compile().as_text()

# Rows sharded by embed_axes too, between devices with their own tokens.
for chunks in ({"chunk": 32}, {"chunk": 32, "vocab_chunk": 10}):

    def local(x, w, targets, weights):
        call = {"vocab_axis": "tensor", "embed_axes": ("data",), "z_loss": 0.1, **chunks}
        return jax.lax.psum(kernels_pallas.cross_entropy(x, w, targets, weights, **call), "data")

    specs = P("data"), P("data", "tensor"), P("data"), P("data")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    forms = sharded, lambda *a: kernels_pallas.cross_entropy(*a, z_loss=0.1)
    one, other = (
        jax.jit(jax.value_and_grad(form, (0, 1, 3), has_aux=True))(x, w, targets, weights)
        for form in forms
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        check(a, b)

# The loss of each token, likewise, weighted afterwards.
def of(losses):
    def total(x, w, targets, weights):
        losses_bt = losses(x, w, targets)
        return jnp.sum((weights - 0.5) * losses_bt), losses_bt

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


def local(x, w, targets):
    call = {"vocab_axis": "tensor", "embed_axes": ("data",), "chunk": 32, "softcap": 9.0}
    return kernels_pallas.token_losses(x, w, targets, **call)


specs = P("data"), P("data", "tensor"), P("data")
sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"))
whole = lambda *a: kernels_pallas.token_losses(*a, softcap=9.0)
one, other = (of(form)(x, w, targets, weights) for form in (sharded, whole))
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    check(a, b)
"""


@pytest.mark.slow
def test_four_devices():
    flags = virtual_devices.flags(4)
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True, timeout=300)
