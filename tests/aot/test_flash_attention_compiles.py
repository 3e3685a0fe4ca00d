"""Flash attention compiles to TPU kernels on each chip, alone and in shard_map, with every option.
Compilation fails if a kernel's blocks exceed the chip's vector memory."""

from functools import partial

import described
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas import flash_attention

# Options besides q, k and v. Those in ARRAYS take an array.
OPTIONS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 700},
    "window_and_sinks": {"window": 700, "sink_tokens": 4, "sinks": True},
    "segments": {"segment_ids": True},
    "prefix": {"prefix": True},
    "softcap": {"softcap": 50.0},
    "positions": {"positions": True},
    "everything": {
        "segment_ids": True, "prefix": True, "positions": True, "sinks": True,
        "window": 700, "sink_tokens": 4, "softcap": 30.0,
    },
}  # fmt: skip
ARRAYS = ("segment_ids", "prefix", "positions", "sinks")
B = 4


def shapes(t, s, n, k, h, hv, options, dtype=jnp.bfloat16):
    """Returns the types of (q, k, v, *arrays of the options)."""
    shape = {"segment_ids": (B, t), "prefix": (B,), "positions": (B, t), "sinks": (n,)}
    extra = [
        jax.ShapeDtypeStruct(shape[name], jnp.float32 if name == "sinks" else jnp.int32)
        for name in ARRAYS
        if name in options
    ]
    q, key, v = (B, t, n, h), (B, s, k, h), (B, s, k, hv)
    return *(jax.ShapeDtypeStruct(x, dtype) for x in (q, key, v)), *extra


def step(options, q, k, v, *arrays):
    """Returns output, log-sum-exp and gradients."""
    inputs = dict(zip([name for name in ARRAYS if name in options], arrays, strict=True))
    attend = partial(flash_attention, return_lse=True, **{**options, **inputs})
    out, pull = jax.vjp(attend, q, k, v)
    return *out, *pull(out)


def kernels(compiled):
    text = compiled.as_text()
    return [f"flash_attention_{way}" in text for way in ("forward", "backward")]


@pytest.mark.slow
@pytest.mark.parametrize("chip", described.CHIPS)
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_compiles_on_each_chip(chip, name):
    options = OPTIONS[name]
    arrays = shapes(256, 256, 2, 2, 128, 128, options)  # one small block: quick to compile
    assert kernels(described.on_one(chip, partial(step, options), *arrays)) == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("chip", described.CHIPS)
@pytest.mark.parametrize("width", [64, 80, 96, 112, 128, 192, 256])
def test_each_head_width_compiles_on_each_chip(chip, width):
    """With the largest blocks."""
    arrays = shapes(32768, 32768, 8, 2, width, 128 if width == 192 else width, {})
    assert kernels(described.on_one(chip, partial(step, {}), *arrays)) == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("chip", described.CHIPS)
def test_all_options_compile_with_the_largest_blocks(chip):
    options = OPTIONS["everything"]
    arrays = shapes(32768, 32768, 8, 2, 256, 256, options)
    assert kernels(described.on_one(chip, partial(step, options), *arrays)) == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("t", "s", "n", "k", "options"),
    [
        (1, 2048, 8, 2, {"positions": True}),
        (3, 512, 8, 1, {"causal": False, "sinks": True}),
        (300, 2048, 8, 8, {"positions": True}),
        (512, 512, 71, 1, {}),
        (512, 512, 32, 1, {"causal": False}),
        (16384, 16384, 4, 4, {"window": 4096}),
    ],
    ids=["decode", "few", "chunk", "71_heads", "multi_query", "long"],
)
def test_unusual_shapes_compile(t, s, n, k, options):
    arrays = shapes(t, s, n, k, 64, 64, options)
    assert kernels(described.on_one("v5e", partial(step, options), *arrays)) == [True, True]


@pytest.mark.slow
def test_float32_compiles():
    arrays = shapes(1024, 1024, 4, 2, 128, 128, {}, jnp.float32)
    assert kernels(described.on_one("v5p", partial(step, {}), *arrays)) == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_shard_map_over_sixteen_chips_needs_no_collectives(name):
    """Shards the batch over one axis and heads over the other, with check_vma."""
    options = OPTIONS[name]
    arrays = shapes(256, 256, 8, 8, 128, 128, options)
    heads = P("a", None, "b", None)
    of = {"sinks": P("b")}
    specs = (heads,) * 3 + tuple(of.get(name, P("a")) for name in ARRAYS if name in options)
    out_specs = (heads, P("a", None, "b"), *(heads,) * 3)
    compiled = described.on_sixteen(partial(step, options), specs, out_specs, *arrays)
    assert kernels(compiled) == [True, True]
    text = compiled.as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
