"""Grouped matmul compiles to TPU kernels on each chip, alone and in shard_map."""

from functools import partial

import described
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas import grouped_matmul

pytestmark = pytest.mark.slow


def types(m, d, f, e, dtype, w_dtype=None):
    return (
        jax.ShapeDtypeStruct((m, d), dtype),
        jax.ShapeDtypeStruct((e, d, f), w_dtype or dtype),
        jax.ShapeDtypeStruct((e,), jnp.int32),
    )


def step(x, w, sizes):
    """Returns the value and both gradients."""
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return y, *pull(y)


@pytest.mark.parametrize("chip", described.CHIPS)
@pytest.mark.parametrize(
    "arrays",
    [
        types(2048, 2048, 1408, 16, jnp.bfloat16),
        types(2048, 4096, 14336, 2, jnp.bfloat16),
        types(600, 5000, 640, 3, jnp.float32),
    ],
    ids=["whole", "deep", "float32"],
)
def test_the_kernels_compile_on_each_chip(chip, arrays):
    # Compilation fails if blocks exceed the chip's vector memory.
    assert described.on_one(chip, step, *arrays).as_text().count("tpu_custom_call") >= 3


@pytest.mark.parametrize("chip", described.CHIPS)
def test_int8_weights_compile_on_each_chip(chip):
    def step(x, w, sizes, scales):
        y, pull = jax.vjp(lambda x: grouped_matmul(x, w, sizes, scales_ef=scales), x)
        return pull(y)

    scales = jax.ShapeDtypeStruct((16, 1408), jnp.float32)
    arrays = *types(2048, 2048, 1408, 16, jnp.bfloat16, jnp.int8), scales
    assert "tpu_custom_call" in described.on_one(chip, step, *arrays).as_text()


def test_shard_map_over_sixteen_chips_compiles():
    """Shards rows over one axis and columns over the other; both gradients are all-reduced."""
    arrays = types(2048, 512, 1024, 8, jnp.bfloat16)

    def loss(sizes, x, w):
        return grouped_matmul(x, w, sizes).astype(jnp.float32).sum()[None, None]

    def gradients(x, w, sizes):
        total, pull = jax.vjp(partial(loss, sizes[0]), x, w)
        return pull(jnp.ones_like(total))

    sizes = jax.ShapeDtypeStruct((4, 8), jnp.int32)
    specs = P("a"), P(None, None, "b"), P("a")
    compiled = described.on_sixteen(gradients, specs, specs[:2], *arrays[:2], sizes)
    assert "tpu_custom_call" in compiled.as_text()
