"""On 8 virtual devices, the optimizer state is sharded like its parameters, and every optimizer
takes the same step as on one device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import virtual_devices

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


@pytest.mark.slow
def test_state_is_created_sharded_and_steps_agree_with_one_device():
    flags = virtual_devices.flags(8)
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def main() -> None:
    """Runs in the subprocess with the virtual devices."""
    from lm import optim

    optimizers = (
        optim.AdamW(weight_decay=0.1),
        optim.SGD(momentum=0.9, weight_decay=0.1),
        optim.Lion(weight_decay=0.1, moments="bfloat16"),
        optim.Adafactor(weight_decay=0.1, factor_above=2, parameter_scale=1e-3),
        optim.LAMB(weight_decay=0.1),
        optim.Muon(weight_decay=0.1),
    )
    for optimizer in optimizers:
        check_update(optimizer)
    check_step(optim.AdamW(weight_decay=0.1, clip_norm=1.0))


def schedule(step):
    return 0.01


def check_update(optimizer) -> None:
    """Compares two updates on a mesh with those on one device, from the same gradients."""
    import jax
    import numpy as np
    import optax

    from lm import optim, trees
    from lm.parallel import sharding
    from lm.parallel.mesh import Mesh

    axes = {
        "embed": ("vocab", "embed"),
        "q": ("layers", "embed", "heads", "head"),
        "up": ("layers", "expert", "embed", "mlp"),
        "scale": ("layers", "norm"),
    }
    sizes = {"embed": (8, 4), "q": (2, 4, 2, 3), "up": (2, 2, 4, 6), "scale": (2, 4)}
    random = np.random.default_rng(0)
    params, gradients = (
        {name: random.normal(size=size).astype(np.float32) for name, size in sizes.items()}
        for _ in range(2)
    )
    transformation = optimizer.build(schedule, axes)
    results = []
    for layout in (Mesh(), Mesh(fsdp=2, expert=2, tensor=2)):
        mesh = layout.build()
        placed = sharding.weight_shardings(axes, params, mesh)
        state_at = optim.state_shardings(transformation, params, placed, mesh)

        def update(gradients, state, params):
            updates, state = transformation.update(gradients, state, params, step=0)
            return optax.apply_updates(params, updates), state

        p = jax.device_put(params, placed)
        state = jax.jit(transformation.init, out_shardings=state_at)(p)
        update = jax.jit(update, out_shardings=(placed, state_at))
        for _ in range(2):
            p, state = update(jax.device_put(gradients, placed), state, p)
        check_placement(trees.flatten(p), state)
        results.append(jax.device_get(p))
    # Sums in a different order differ by 1e-7, which Newton-Schulz amplifies.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), *results)
    print(type(optimizer).__name__, "agrees")


def check_placement(params, opt_state) -> None:
    """State takes no more memory per device than its parameter and is sharded like it."""
    import jax

    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        param = params.get("/".join(keys))
        if param is None:
            assert leaf.shape == (), path
            continue
        ours, theirs = (x.sharding.shard_shape(x.shape) for x in (leaf, param))
        # A factored dimension has size 1; others are sharded like those of the parameter.
        assert all(n in (m, 1) for n, m in zip(ours, theirs, strict=True)), path


def check_step(optimizer) -> None:
    """Compares training steps with microbatches with one device without them."""
    import jax
    import numpy as np

    from lm import model, objectives, training, trees
    from lm.data.batch import Batch
    from lm.parallel.mesh import Mesh, Place
    from lm.precision import Precision

    c = model.Config(
        vocab=64,
        dim=16,
        layers=2,
        attention=model.GQA(heads=4, kv_heads=2, head_dim=4),
        ffn=model.SwiGLU(hidden=32),
    )
    random = np.random.default_rng(0)
    tokens = random.integers(0, 64, (16, 9), dtype=np.int32)
    batch = Batch(
        tokens[:, :-1],
        tokens[:, 1:],
        random.uniform(0, 2, (16, 8)).astype(np.float32),
        np.ones((16, 8), np.int32),
        np.broadcast_to(np.arange(8, dtype=np.int32), (16, 8)),
    )
    transformation = optimizer.build(schedule, model.axes(c))
    lines = []
    for layout, microbatches in ((Mesh(), 1), (Mesh(data=2, fsdp=2, tensor=2), 2)):
        mesh = layout.build()
        shardings = training.state_shardings(c, transformation, Precision(), mesh)
        state, _ = training.init_state(c, transformation, Precision(), 0, shardings)
        step = training.make_step(
            *(c, objectives.NextToken(), optimizer, schedule, Precision()),
            place=Place(mesh=layout, microbatches=microbatches),
        )
        compiled = training.compile_step(step, shardings, mesh).lower(state, batch, {}).compile()
        if microbatches > 1:
            check_no_row_moves(compiled.as_text())
        placed = jax.device_put(batch, compiled.input_shardings[0][1])
        for _ in range(3):
            state, metrics = compiled(state, placed, {})
            lines.append({name: float(x) for name, x in metrics.items()})
        jax.tree.map(lambda x, at: None if x.sharding == at else 1 / 0, state, shardings[0])
        check_placement(trees.flatten(state.params), state.opt_state)
    for alone, together in zip(lines[:3], lines[3:], strict=True):
        for name, value in alone.items():
            assert abs(together[name] - value) <= 2e-5 * abs(value), (name, value, together[name])


def check_no_row_moves(text: str) -> None:
    """Splitting a batch of 16 rows into microbatches sends no row to another device. (The embedding
    lookup in a table sharded over fsdp does, in its own shard_map.)"""
    for line in text.splitlines():
        if "/shard_map/" in line:
            continue
        if any(f" {op}(" in line for op in ("all-gather", "all-to-all", "collective-permute")):
            assert "s32[" not in line.split(" = ")[1][:6], line


if __name__ == "__main__":
    main()
