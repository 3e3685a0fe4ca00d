"""The compiled pipeline, forward and backward, compared with a plain implementation: layers vmapped
over stages, activations rolled from stage to stage, sharding by the partitioner.

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
    """Plain implementation: every stage holds all microbatches of its `data` shard."""
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
    """Returns (collectives, peak bytes) of one device, forward and backward."""
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
    collectives = links.collectives(hlo.parse(program.as_text()), layout)
    return collectives, program.memory_analysis().peak_memory_in_bytes


def test_only_activations_are_sent_and_gradients_are_all_reduced_once():
    collectives, peak = compiled(ours)
    moved = {(row.kind, row.axes, row.dtype): row for row in collectives}
    stream = moved.pop(("collective-permute", "pipe", "bf16"))
    # Activations and waiting microbatches, forward and backward, and once more after the loop.
    assert stream.count == 4 * SCHEDULE.iterations + 2
    assert stream.hidden == stream.seconds
    gradients = moved.pop(("all-reduce", "data", "bf16"))
    assert (gradients.count, gradients.nbytes) == (1, SCHEDULE.depth * WIDTH * WIDTH * 2)
    loss = moved.pop(("all-reduce", "pipe+data", "f32"))
    assert (loss.count, loss.nbytes, moved) == (1, 4, {})
    # The plain implementation sums gradients in each iteration, all-gathers activations, and uses
    # more memory.
    plain_collectives, plain_peak = compiled(plain)
    assert sum(row.count for row in plain_collectives) > sum(row.count for row in collectives)
    assert any(row.kind == "all-gather" for row in plain_collectives) and plain_peak > peak


def test_weights_of_a_circular_schedule_move_by_all_to_all():
    """Over pipe alone, without an all-gather over other axes."""
    schedule = Schedule(layers=12, stages=2, circular_repeats=2, microbatches=4)
    weight = PartitionSpec(None, ("fsdp", "pipe"), "tensor")
    form = partial(ours, schedule=schedule, weight=weight)
    collectives, _ = compiled(form, weight, pipe=2, fsdp=4, tensor=2)
    shard = schedule.layers * WIDTH * WIDTH // 16 * 2  # bytes, in bfloat16
    all_to_alls = [row for row in collectives if row.kind == "all-to-all"]
    assert [(row.axes, row.count, row.nbytes) for row in all_to_alls] == [("pipe", 2, 2 * shard)]
    # Layers all-gather weights over fsdp and activations over tensor; nothing over both.
    gathered = {row.axes for row in collectives if row.kind == "all-gather"}
    assert gathered <= {"fsdp", "tensor"}


if __name__ == "__main__":
    for form in (plain, ours):
        collectives, peak = compiled(form)
        print(form.__name__, "peak", terminal.size(peak))
        for row in collectives:
            size, seconds = terminal.size(row.nbytes), terminal.duration(row.seconds)
            print("   ", row.kind, row.axes, row.dtype, f"{row.count} x, {size}, {seconds}")
