"""Paged attention compiles to a TPU kernel on each chip, alone and in shard_map."""

from functools import partial

import described
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas import paged_attention

pytestmark = pytest.mark.slow


def types(dtype, b=8, t=1, n=16, k=8, h=128, slots=128, pages=64):
    cache = jax.ShapeDtypeStruct((pages, k, slots, h), dtype)
    q = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
    return (
        jax.ShapeDtypeStruct((b, t, n, h), q),
        cache,
        cache,
        jax.ShapeDtypeStruct((b, 16), jnp.int32),
        jax.ShapeDtypeStruct((b,), jnp.int32),
    )


@pytest.mark.parametrize("chip", described.CHIPS)
@pytest.mark.parametrize(
    ("arrays", "options"),
    [
        (types(jnp.bfloat16), {}),
        (types(jnp.bfloat16, t=3, n=32, k=1, h=64, slots=16), {"window": 500, "softcap": 30.0}),
        (types(jnp.float32, b=3, k=16), {"window": 100}),
    ],
    ids=["plain", "window", "float32"],
)
def test_the_kernel_compiles_on_each_chip(chip, arrays, options):
    compiled = described.on_one(chip, partial(paged_attention, **options), *arrays)
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize("chip", described.CHIPS)
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn], ids=["int8", "fp8"])
def test_quantized_pages_compile_on_each_chip(chip, dtype):
    def run(*arrays):
        return paged_attention(*arrays[:5], k_scales_pks=arrays[5], v_scales_pks=arrays[6])

    scales = jax.ShapeDtypeStruct((64, 8, 128), jnp.float32)
    compiled = described.on_one(chip, run, *types(dtype), scales, scales)
    assert "tpu_custom_call" in compiled.as_text()


def test_shard_map_over_sixteen_chips_needs_no_collectives():
    """Shards sequences over one axis and heads over the other."""
    heads, pages = P("a", None, "b"), P("a", "b")
    specs = heads, pages, pages, P("a"), P("a")
    compiled = described.on_sixteen(paged_attention, specs, heads, *types(jnp.bfloat16))
    assert "tpu_custom_call" in compiled.as_text()
    assert "all-" not in compiled.as_text()
