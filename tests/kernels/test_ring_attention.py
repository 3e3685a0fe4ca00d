"""Context-parallel attention equals attention on one device: values and gradients, with documents,
windows, soft caps and sinks. Four virtual devices, in a process of their own."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
import virtual_devices
from jax.sharding import AxisType, Mesh, PartitionSpec
from kernel_helpers import jit, normal

import kernels_pallas

ROOT = Path(__file__).parents[2]
PATHS = str(ROOT), str(ROOT / "tests")

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
import tolerance
from jax.sharding import AxisType, PartitionSpec as P

from kernels_pallas import flash_attention, gathered_attention, in_order, placement, ring_attention

DEVICES, T = 4, 32
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("context",), axis_types=(AxisType.Auto,))
keys = jax.random.split(jax.random.key(0), 4)
q, k, v, dout = (jax.random.normal(key, (2, T, n, 8)) for key, n in zip(keys, (4, 2, 2, 4)))
documents = np.repeat([[1, 1, 1, 2, 2, 3, 3, 0], [1, 2, 2, 2, 2, 2, 2, 2]], T // 8, axis=1)
documents = jnp.asarray(documents, jnp.int32)
sinks = jnp.linspace(0, 1.5, 4)
order, rows = placement(T, DEVICES), P(None, "context")


def on_devices(attend, q, k, v, sinks, segment_ids, options):
    def local(q, k, v, sinks, segment_ids):
        out = attend(
            q, k, v, sinks=sinks, segment_ids=segment_ids, axis_name="context", **options
        )
        return in_order(out, "context")

    arrays = [None if x is None else x[:, order] for x in (q, k, v, segment_ids)]
    specs = rows, rows, rows, None if sinks is None else P(), None if segment_ids is None else rows
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows)
    return mapped(*arrays[:3], sinks, arrays[3])


def check(segment_ids=None, sinks=None, forms=(ring_attention, gathered_attention), **options):
    def value_and_gradients(function):
        out, pull = jax.vjp(function, q, k, v, sinks)
        return out, pull(dout)

    want = jax.jit(value_and_gradients, static_argnums=0)(
        lambda q, k, v, sinks: flash_attention(
            q, k, v, sinks=sinks, segment_ids=segment_ids, **options
        )
    )
    for attend in forms:
        got = jax.jit(value_and_gradients, static_argnums=0)(
            lambda q, k, v, sinks: on_devices(attend, q, k, v, sinks, segment_ids, options)
        )
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            # Sums over queries, keys and twice the head width; scores are below 6.
            atol = tolerance.of_chain(b, T, T, 8, 8, 8 * 6**2)
            np.testing.assert_allclose(a, b, rtol=0, atol=atol)


check()
check(causal=False)
check(segment_ids=documents)
check(segment_ids=documents, window=7, softcap=3.0, sinks=sinks)
check(segment_ids=documents, window=5, sink_tokens=2, forms=(gathered_attention,))
check(alibi=2.0 ** -jnp.arange(1, 5))
"""


@pytest.mark.slow
def test_sharded_sequences():
    flags = virtual_devices.flags(4)
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(PATHS)}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True, timeout=600)


@pytest.mark.parametrize(
    "name", ["ring_attention", pytest.param("gathered_attention", marks=pytest.mark.slow)]
)
def test_one_device(name):
    """On an axis of one device, the two halves of the sequence still attend to each other."""
    t, h = 16, 8
    q, k, v, dout = (normal(i, 1, t, n, h) for i, n in enumerate((2, 1, 1, 2)))
    ids = jnp.array([[1] * 5 + [2] * 11])
    mesh = Mesh(np.array(jax.devices()[:1]), ("context",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec(None, "context")
    attend = partial(getattr(kernels_pallas, name), axis_name="context")
    mapped = jax.shard_map(
        lambda q, k, v, ids: attend(q, k, v, segment_ids=ids),
        mesh=mesh,
        in_specs=(rows,) * 4,
        out_specs=rows,
    )

    def value_and_gradients(function):
        out, pull = jax.vjp(lambda *a: function(*a, ids), q, k, v)
        return out, *pull(dout)

    def alone(q, k, v, ids):
        return kernels_pallas.flash_attention(q, k, v, segment_ids=ids)

    got = jit(partial(value_and_gradients, mapped))()
    want = jit(partial(value_and_gradients, alone))()
    for a, b in zip(got, want, strict=True):
        # Sums over queries, keys and twice the head width; scores are below 6.
        atol = tolerance.of_chain(b, t, t, h, h, h * 6**2)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_placement_is_a_permutation_that_balances_causal_work(devices):
    order = kernels_pallas.placement(64, devices)
    np.testing.assert_array_equal(np.sort(order), np.arange(64))
    keys = (order + 1).reshape(devices, -1).sum(1)  # visible to the queries of each device
    assert len(set(keys)) == 1


def test_rejects_unsupported_arguments():
    x = jnp.zeros((1, 3, 1, 4))
    with pytest.raises(ValueError, match="two halves of equal length, not 3 tokens"):
        kernels_pallas.ring_attention(x, x, x, axis_name="context")
    x = jnp.zeros((1, 4, 1, 4))
    with pytest.raises(ValueError, match="sink_tokens=2.*use gathered_attention"):
        kernels_pallas.ring_attention(x, x, x, axis_name="context", window=2, sink_tokens=2)
