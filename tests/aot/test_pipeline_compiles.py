"""The pipeline as a TPU's compiler sees it, forward and backward, beside the plain form: layers
vmapped over stages, and the stream rolled from stage to stage for the partitioner to split.

`python tests/aot/test_pipeline_compiles.py` prints both."""

from functools import partial

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lm import terminal
from lm.parallel import sharding
from lm.parallel.mesh import AXES
from lm.parallel.pipeline import Schedule, pipeline
from lm.planning import hlo, links, slices

pytestmark = pytest.mark.slow

SCHEDULE = Schedule(layers=12, stages=4, circular_repeats=1, microbatches=8)
WIDTH, BATCH, LENGTH = 2048, 32, 4096
WEIGHT = PartitionSpec("pipe", None, None)
ROWS = PartitionSpec(("pipe", "data", "fsdp"))


def layer(x, w):
    return x + jnp.tanh(jnp.einsum("btd,df->btf", x, w))


def ours(w, x, schedule=SCHEDULE, weight=WEIGHT):
    def begin(along, microbatch):
        return lambda w, x, number: (layer(x, w), {})

    return pipeline(begin, w, x, {}, schedule, partitions=[weight])[0]


def plain(w, x):
    """Each device of `data` has all of its micro-batches on every stage."""
    stages, microbatches = SCHEDULE.stages, SCHEDULE.microbatches
    w = w.reshape(stages, SCHEDULE.depth, *w.shape[1:])
    x = x.reshape(-1, microbatches, LENGTH, WIDTH).swapaxes(0, 1)
    x = sharding.constrain(x, PartitionSpec(None, "data"))
    on_stages = PartitionSpec("pipe", "data")

    @jax.checkpoint
    def group(w, x):
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0]

    def iterate(held, step):
        entering = jax.lax.dynamic_index_in_dim(x, step % microbatches, keepdims=False)
        held = jnp.roll(held, 1, axis=0).at[0].set(entering)
        held = jax.vmap(group)(w, sharding.constrain(held, on_stages))
        return held, sharding.constrain(held[-1], PartitionSpec("data"))

    held = jnp.zeros((stages, *x.shape[1:]), x.dtype)
    _, left = jax.lax.scan(iterate, held, jnp.arange(SCHEDULE.iterations))
    return left[stages - 1 :].swapaxes(0, 1).reshape(BATCH, LENGTH, WIDTH)


def compiled(form, weight=WEIGHT, **sizes):
    """(collectives, bytes at the fullest moment) of one device, forward and backward."""
    sizes = sizes or {"data": 4, "pipe": 4}
    shape = [sizes.get(axis, 1) for axis in AXES]
    devices = np.array(described.devices(described.SIXTEEN)).reshape(shape)
    mesh = jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    weights, rows, one = (NamedSharding(mesh, p) for p in (weight, ROWS, PartitionSpec()))
    w = jax.ShapeDtypeStruct((SCHEDULE.layers, WIDTH, WIDTH), jnp.float32, sharding=weights)
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.bfloat16, sharding=rows)

    def step(w, x):
        def loss(w):
            with sharding.use(mesh):
                return jnp.square(form(w.astype(x.dtype), x).astype(jnp.float32)).sum()

        return jax.value_and_grad(loss)(w)

    program = jax.jit(step, out_shardings=(one, weights)).lower(w, x).compile()
    layout = links.Layout(devices, AXES, slices.find("v5e-16"))
    found = links.collectives(hlo.parse(program.as_text()), layout)
    return found, program.memory_analysis().peak_memory_in_bytes


def test_only_the_stream_passes_and_gradients_are_summed_once():
    found, peak = compiled(ours)
    moved = {(row.kind, row.axes, row.dtype): row for row in found}
    stream = moved.pop(("collective-permute", "pipe", "bf16"))
    # What goes on and what waits, forward and backward, and what is left behind at the end.
    assert stream.count == 4 * SCHEDULE.iterations + 2
    assert stream.hidden == stream.seconds
    gradients = moved.pop(("all-reduce", "data", "bf16"))
    assert (gradients.count, gradients.nbytes) == (1, SCHEDULE.depth * WIDTH * WIDTH * 2)
    loss = moved.pop(("all-reduce", "pipe+data", "f32"))
    assert (loss.count, loss.nbytes, moved) == (1, 4, {})
    # The plain form sums them in each iteration and gathers the stream, in more memory.
    other, most = compiled(plain)
    assert sum(row.count for row in other) > sum(row.count for row in found)
    assert any(row.kind == "all-gather" for row in other) and most > peak


def test_weights_of_several_rounds_travel_in_the_parts_in_which_they_are_kept():
    """By an exchange between stages alone: nothing is gathered for it."""
    schedule = Schedule(layers=12, stages=2, circular_repeats=2, microbatches=4)
    weight = PartitionSpec(None, ("fsdp", "pipe"), "tensor")
    form = partial(ours, schedule=schedule, weight=weight)
    found, _ = compiled(form, weight, pipe=2, fsdp=4, tensor=2)
    part = schedule.layers * WIDTH * WIDTH // 16 * 2  # bytes, in bfloat16
    exchanges = [row for row in found if row.kind == "all-to-all"]
    assert [(row.axes, row.count, row.nbytes) for row in exchanges] == [("pipe", 2, 2 * part)]
    # Layers gather weights over fsdp and activations over tensor; over both there is nothing to.
    gathered = {row.axes for row in found if row.kind == "all-gather"}
    assert gathered <= {"fsdp", "tensor"}


if __name__ == "__main__":
    for form in (plain, ours):
        found, peak = compiled(form)
        print(form.__name__, "peak", terminal.size(peak))
        for row in found:
            size, seconds = terminal.size(row.nbytes), terminal.duration(row.seconds)
            print("   ", row.kind, row.axes, row.dtype, f"{row.count} x, {size}, {seconds}")
