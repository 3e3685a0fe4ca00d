"""Quantized matmuls compile to TPU kernels on each chip, alone and in shard_map."""

import described
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas.quantized_matmul import Packed, int8_matmul, packed_matmul

pytestmark = pytest.mark.slow


def packed(d, f, bits, group=128):
    """Returns the types of the arrays of Packed that are not None."""
    words = [d // 8] if bits == 4 else [d // 16, d // 32]
    low, *high = (jax.ShapeDtypeStruct((rows, f), jnp.int32) for rows in words)
    return low, *high, jax.ShapeDtypeStruct((d // group, f), jnp.float32)


def matmul(x, low, *rest):
    high, scales = rest if len(rest) == 2 else (None, *rest)
    return packed_matmul(x, Packed(low, high, scales))


@pytest.mark.parametrize("chip", described.CHIPS)
@pytest.mark.parametrize("rows", [8, 1024])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (3, 32)])
def test_packed_weights_compile_on_each_chip(chip, rows, bits, group):
    x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
    compiled = described.on_one(chip, matmul, x, *packed(4096, 3000, bits, group))
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize("chip", described.CHIPS)
def test_packed_weights_in_float32_with_a_large_contraction_compile(chip):
    x = jax.ShapeDtypeStruct((600, 14336), jnp.float32)
    compiled = described.on_one(chip, matmul, x, *packed(14336, 1024, 4))
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize("chip", described.CHIPS)
def test_int8_weights_compile_on_each_chip(chip):
    x = jax.ShapeDtypeStruct((1100, 5000), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((5000, 3000), jnp.int8)
    scales = jax.ShapeDtypeStruct((3000,), jnp.float32)
    assert "tpu_custom_call" in described.on_one(chip, int8_matmul, x, w, scales).as_text()


def test_shard_map_over_sixteen_chips_compiles():
    """Shards rows over one axis and columns over the other; includes the gradient of x."""

    def both(x, *arrays):
        y, pull = jax.vjp(lambda x: matmul(x, *arrays), x)
        return pull(y)[0]

    arrays = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16), *packed(1024, 2048, 4)
    columns = P(None, "b")
    compiled = described.on_sixteen(both, (P("a"), columns, columns), P("a"), *arrays)
    assert "tpu_custom_call" in compiled.as_text()
