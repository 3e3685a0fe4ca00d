"""On 4 virtual devices, expert parallelism returns the same rows and gradients as local experts,
for any load of the experts and any buffer size.

The ragged all-to-all of TPUs does not run here. An implementation of its documentation replaces it,
so that the sizes and offsets passed to it are checked too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import virtual_devices

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
DEVICES, EXPERTS, ROWS, WIDTH = 4, 8, 12, 5
# Rows of each device for each expert; fewer than ROWS per device where tokens are masked.
LOADS = {
    "even": [[1, 2, 1, 2, 1, 2, 1, 2]] * DEVICES,
    "all for one device": [[0, 0, 12, 0, 0, 0, 0, 0]] * DEVICES,
    "one device sends": [[3, 0, 2, 0, 1, 4, 1, 1], [0] * 8, [0] * 8, [0, 0, 0, 0, 0, 0, 0, 5]],
    "none": [[0] * 8] * DEVICES,
}


@pytest.mark.parametrize("form", [pytest.param("gathered", marks=pytest.mark.slow), "ragged"])
def test_expert_parallelism_equals_local_experts(form):
    flags = virtual_devices.flags(DEVICES)
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    command = [sys.executable, __file__, form]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def main(form: str) -> None:
    """Runs in the subprocess with the virtual devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec

    from lm.model import expert_parallel

    def written_out(x, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name):
        """Implements the documentation of jax.lax.ragged_all_to_all."""
        everywhere = [jax.lax.all_gather(a, axis_name) for a in (x, input_offsets, output_offsets)]
        x_pm, from_pi, to_pi = everywhere
        each = recv_sizes.size // DEVICES
        row = jnp.arange(output.shape[0])
        me = jax.lax.axis_index(axis_name)
        for i in range(recv_sizes.size):
            source, there = i // each, me * each + i % each
            first = to_pi[source, there]
            inside = (row >= first) & (row < first + recv_sizes[i])
            taken = x_pm[source].at[row - first + from_pi[source, there]].get(mode="clip")
            output = jnp.where(inside[:, None], taken, output)
        return output

    if form == "ragged":
        jax.lax.ragged_all_to_all = written_out
        expert_parallel._by_platform = lambda ragged, gathered, *arrays: ragged(*arrays)

    mesh = jax.make_mesh((DEVICES,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("expert")
    random = np.random.default_rng(0)
    x = random.normal(size=(DEVICES * ROWS, WIDTH)).astype(np.float32)
    w = random.normal(size=(EXPERTS, WIDTH)).astype(np.float32)

    def feed(rows, sizes_g, w):
        w = jnp.asarray(w)
        expert_r = jnp.searchsorted(jnp.cumsum(sizes_g), jnp.arange(len(rows)), side="right")
        return jnp.sin(rows * w.at[expert_r].get(mode="fill", fill_value=0))

    for buffer in (4, 18):

        def far(counts_e, x, w, buffer=buffer):
            return expert_parallel.on_experts(feed, buffer, counts_e.reshape(-1), x, w)

        @jax.jit
        def loss(x, w, counts, far=far):
            y = jax.shard_map(far, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)(counts, x, w)
            return jnp.square(y + 1).sum(), y

        for name, load in LOADS.items():
            counts = np.array(load, np.int32)
            near = [
                feed(x[p * ROWS : (p + 1) * ROWS], jnp.array(counts[p]), w) for p in range(DEVICES)
            ]
            y = loss(x, w, counts)[1]
            np.testing.assert_allclose(y, np.concatenate(near), rtol=1e-6, err_msg=name)
            got = jax.jit(jax.grad(lambda *a: loss(*a)[0], (0, 1)))(x, w, counts)
            want = gradients(x, w, counts)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want
            )
        print(form, buffer, "agrees")


def gradients(x, w, counts):
    """Returns the gradients of the same loss, computed row by row."""
    import numpy as np

    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for p, load in enumerate(counts):
        for row, expert in enumerate(np.repeat(np.arange(EXPERTS), load)):
            i = p * ROWS + row
            inner = 2 * (np.sin(x[i] * w[expert]) + 1) * np.cos(x[i] * w[expert])
            dx[i], dw[expert] = inner * w[expert], dw[expert] + inner * x[i]
    return dx, dw


if __name__ == "__main__":
    main(sys.argv[1])
