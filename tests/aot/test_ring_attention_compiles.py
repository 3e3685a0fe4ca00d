"""Ring attention compiled for 64 chips, forward and backward: keys and values move only by
collective-permute, and attention runs in the TPU kernel."""

import re

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import ring_attention

FSDP, CONTEXT = 8, 8
LENGTH, QUERY_HEADS, HEADS, WIDTH = 8192, 4, 2, 128
ROWS = P("fsdp", "context")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "documents_and_window"])
def test_keys_and_values_move_only_by_collective_permute(name):
    grid = np.array(described.devices("v5p:4x4x4")).reshape(FSDP, CONTEXT)
    mesh = Mesh(grid, ("fsdp", "context"), axis_types=(AxisType.Auto,) * 2)
    with_documents = name == "documents_and_window"

    def local(q, k, v, segment_ids):
        options = {"segment_ids": segment_ids, "window": 3000} if with_documents else {}
        return ring_attention(q, k, v, axis_name="context", **options)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(ROWS,) * 4, out_specs=ROWS)

    def step(q, k, v, segment_ids):
        out, pull = jax.vjp(lambda *a: mapped(*a, segment_ids), q, k, v)
        return out, *pull(out)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, ROWS))

    keys = array(FSDP, LENGTH, HEADS, WIDTH)
    arrays = array(FSDP, LENGTH, QUERY_HEADS, WIDTH), keys, keys
    with jax.set_mesh(mesh):
        lowered = jax.jit(step).lower(*arrays, array(FSDP, LENGTH, dtype=jnp.int32))
        text = lowered.compile().as_text()
    assert "flash_attention_forward" in text and "flash_attention_backward" in text
    assert not re.findall(r"all-gather|all-to-all|all-reduce|reduce-scatter", text)
    # Only shards of keys and values are sent: in bfloat16, and their gradients in float32.
    moved = re.findall(r"= .*collective-permute(?:-start)?\(", text)
    shard = f"[1,{LENGTH // CONTEXT},{HEADS},{WIDTH}]"
    kinds = set(re.findall(r"\b[a-z]+\d+\[[\d,]*\]", "\n".join(moved)))
    assert {f"bf16{shard}", f"f32{shard}"} <= kinds
    assert all(np.prod(_sizes(kind)) <= np.prod(_sizes(shard)) for kind in kinds)


def _sizes(kind: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", kind[kind.index("[") :])]
