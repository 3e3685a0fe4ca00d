"""A step of the generation engine compiles for TPUs: with the paged kernels, without a copy of the
pages, and with the collectives of tensor parallelism only."""

import dataclasses
import math
from functools import partial

import described
import jax
import jax.numpy as jnp
import pytest

from experiments import llama3_8b
from kernels_pallas import paged_attention, write_pages
from lm.generate import programs
from lm.parallel.mesh import AXES, Mesh
from lm.planning import compiled, links, slices
from lm.planning.engine import Engine

LAYERS, ROWS, TOKENS = 2, 64, 2**20
# Instructions that move no data, and the kernel that writes in place.
IN_PLACE = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "custom-call"}
slow = pytest.mark.slow


def built(name, ways, context=4096, **options):
    """(engine, its compiled program) of an 8B with two layers on the first devices of a slice."""
    described.devices("v5e:2x2")  # skips the test without libtpu
    model = dataclasses.replace(llama3_8b.experiment().model, layers=LAYERS)
    devices = compiled.describe(slices.find(name))[:ways]
    options = {"compute": "bfloat16"} | options
    engine = Engine.of(model, mesh=Mesh(tensor=ways).build(devices), context=context, **options)
    caches = engine.caches(engine.counts(TOKENS, ROWS))
    arguments = engine.arguments(ROWS, caches)
    lower = partial(programs.forward.lower, *arguments)
    return engine, compiled.build(lower, arguments, engine.model.mesh, name)


@pytest.mark.parametrize(
    ("name", "ways", "options"),
    [
        ("v6e-8", 8, {}),
        pytest.param("v5p-8", 4, {}, marks=slow),
        pytest.param("v5e-4", 4, {"dtype": "int8"}, marks=slow),
        pytest.param("v5e-4", 1, {}, marks=slow),
        pytest.param("v6e-4", 1, {"dtype": "int8"}, marks=slow),
        pytest.param("v5p-8", 1, {"compute": "float32", "dtype": "bfloat16"}, marks=slow),
    ],
    ids=str,
)
def test_the_pages_are_written_in_place(name, ways, options):
    """On one device the layers are unrolled, on a mesh scanned."""
    engine, result = built(name, ways, **options)
    kernels = set()
    keys = TOKENS * 8 // ways * 128  # elements of one layer's keys on a device
    for each, computation, _, _ in result.program.executed():
        if "tpu_custom_call" in each.rest:
            kernels.add(each.name.partition(".")[0])
        largest = max((math.prod(x.shape) for x in each.arrays if len(x.shape) > 3), default=0)
        assert each.op in IN_PLACE or largest < keys, (computation, each.name, each.shape)
    assert kernels == {"paged_attention", "write_pages"}
    temporaries = result.peak - result.arguments
    assert temporaries < keys * jnp.dtype(engine.dtype).itemsize


@slow
@pytest.mark.parametrize(("name", "ways"), [("v6e-8", 8), ("v5p-8", 4)], ids=str)
def test_collectives_are_those_of_tensor_parallelism(name, ways):
    """A sum after attention, feed-forward and embedding, and the logits gathered."""
    _, result = built(name, ways)
    layout = links.Layout(result.mesh.devices, AXES, slices.find(name))
    rows = links.collectives(result.program, layout)
    assert {row.axes for row in rows} == {"tensor"}
    counts = {row.kind: row.count for row in rows}
    assert counts == {"all-reduce": 2 * LAYERS + 1, "all-gather": 1}
    sums = next(row for row in rows if row.kind == "all-reduce")
    assert sums.nbytes == counts["all-reduce"] * ROWS * 4096 * 2


@slow
@pytest.mark.parametrize("chip", described.CHIPS)
@pytest.mark.parametrize(
    ("dtype", "heads", "width", "slots", "rows"),
    [
        (jnp.bfloat16, 8, 128, 128, 64),
        (jnp.bfloat16, 1, 64, 16, 3),
        (jnp.float32, 8, 256, 32, 300),
        (jnp.int8, 2, 128, 128, 200),
    ],
    ids=str,
)
def test_writing_compiles_on_each_chip(chip, dtype, heads, width, slots, rows):
    pages = [jax.ShapeDtypeStruct((64, heads, slots, width), dtype)] * 2
    new = [jax.ShapeDtypeStruct((rows, heads, width), dtype)] * 2
    if dtype == jnp.int8:
        pages += [jax.ShapeDtypeStruct((64, heads, slots), jnp.float32)] * 2
        new += [jax.ShapeDtypeStruct((rows, heads), jnp.float32)] * 2
    places = [jax.ShapeDtypeStruct((rows,), jnp.int32)] * 2

    def run(*arrays):
        n = len(pages)
        return write_pages(arrays[:n], arrays[n : 2 * n], *arrays[2 * n :])

    text = described.on_one(chip, run, *pages, *new, *places).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert "scatter" not in text


@slow
@pytest.mark.parametrize("chip", described.CHIPS)
@pytest.mark.parametrize(
    ("queries", "pages"), [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)], ids=str
)
def test_pages_of_another_dtype_are_read_as_they_are(chip, queries, pages):
    cache = jax.ShapeDtypeStruct((64, 8, 128, 128), pages)
    numbers = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8, 16), (8,)))
    q = jax.ShapeDtypeStruct((8, 1, 32, 128), queries)
    result = described.on_one(chip, paged_attention, q, cache, cache, *numbers)
    assert "tpu_custom_call" in result.as_text()
    assert result.memory_analysis().temp_size_in_bytes < 64 * 8 * 128 * 128
