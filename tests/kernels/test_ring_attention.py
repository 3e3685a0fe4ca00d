"""Attention of a sequence that is split over devices, against that of one device: values and
gradients, with documents, windows, caps and sinks. On virtual devices, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas

ROOT = Path(__file__).parents[2]

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
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
    def gradient(function):
        loss = lambda q, k, v, sinks: (function(q, k, v, sinks) * dout).sum()
        wanted = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
        return jax.jit(jax.value_and_grad(loss, wanted))(q, k, v, sinks)

    want = gradient(
        lambda q, k, v, sinks: flash_attention(
            q, k, v, sinks=sinks, segment_ids=segment_ids, **options
        )
    )
    for attend in forms:
        got = gradient(
            lambda q, k, v, sinks: on_devices(attend, q, k, v, sinks, segment_ids, options)
        )
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            # Sums of float32 in another order.
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


check()
check(causal=False)
check(segment_ids=documents)
check(segment_ids=documents, window=7, softcap=3.0, sinks=sinks)
check(segment_ids=documents, window=5, sink_tokens=2, forms=(gathered_attention,))
check(alibi=2.0 ** -jnp.arange(1, 5))
"""


@pytest.mark.slow
def test_split_sequences():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True, timeout=600)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_placement_is_a_permutation_that_shares_causal_work(devices):
    order = kernels_pallas.placement(64, devices)
    np.testing.assert_array_equal(np.sort(order), np.arange(64))
    seen = (order + 1).reshape(devices, -1).sum(1)  # keys that the queries of a device see
    assert len(set(seen)) == 1


def test_what_a_ring_cannot_do_is_refused():
    x = jnp.zeros((1, 3, 1, 4))
    with pytest.raises(ValueError, match="two halves of equal length, not 3 tokens"):
        kernels_pallas.ring_attention(x, x, x, axis_name="context")
    x = jnp.zeros((1, 4, 1, 4))
    with pytest.raises(ValueError, match="sink_tokens=2.*use gathered_attention"):
        kernels_pallas.ring_attention(x, x, x, axis_name="context", window=2, sink_tokens=2)
