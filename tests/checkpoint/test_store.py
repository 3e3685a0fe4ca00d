"""Checkpoints restore bit for bit on any mesh; damaged and mismatched checkpoints are rejected."""

import asyncio
import gc
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import virtual_devices

from lm.checkpoint import Save, Store
from lm.checkpoint.store import checksums
from lm.errors import UserError

ROOT = Path(__file__).parents[2]
OPTIMIZER = optax.adamw(1e-3)


class State(NamedTuple):
    """Has the structure of a run's state: named tuples, a None, three dtypes."""

    step: Any
    params: Any
    opt_state: Any
    loss_scale: Any


def make_state(seed: int, width: int = 8) -> State:
    key = jax.random.key(seed)
    params = {
        "embed": {"table": jax.random.normal(key, (16, width))},
        "blocks": {"0": {"up": jax.random.normal(key, (2, width, 24), jnp.bfloat16)}},
    }
    return State(jnp.int32(seed), params, OPTIMIZER.init(params), None)


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def save_steps(folder: Path, *steps: int, save: Save | None = None) -> None:
    with Store(folder, save or Save(every=1, keep_last=10)) as store:
        for step in steps:
            store.save(step, make_state(step), {"name": "run"})


def test_state_restores_bit_for_bit_with_dtypes_and_named_tuples(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    store = Store(tmp_path)
    assert store.steps() == [1, 2]
    assert store.metadata() == {"name": "run"}
    assert_same(store.restore(abstract(make_state(0))), make_state(2))
    assert_same(store.restore(abstract(make_state(0)), step=1), make_state(1))


def test_any_optax_state_restores(tmp_path: Path) -> None:
    """Nested states, each without some of the parameters."""
    params = make_state(1).params
    labels = {"embed": "adam", "blocks": "trace"}
    transformation = optax.multi_transform(
        {"adam": optax.scale_by_adam(), "trace": optax.trace(0.9)}, labels
    )
    state = State(jnp.int32(1), params, transformation.init(params), None)
    _, opt_state = transformation.update(params, state.opt_state)
    state = state._replace(opt_state=opt_state)
    with Store(tmp_path, Save(every=1)) as store:
        store.save(1, state)
    assert_same(Store(tmp_path).restore(abstract(state)), state)


def test_params_restore_separately_as_a_nested_dict(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    assert_same(Store(tmp_path).restore_params(), make_state(3).params)


def test_state_may_be_donated_while_it_is_being_saved(tmp_path: Path) -> None:
    bump = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    state = {"params": {"w": jnp.zeros((512, 512))}}  # large enough that writing takes a while
    with Store(tmp_path, Save(every=1, keep_last=10)) as store:
        for step in range(6):
            store.save(step, state)
            for _ in range(3):
                state = bump(state)
    for step in range(6):
        restored = Store(tmp_path).restore_params(step)
        np.testing.assert_array_equal(restored["w"], np.full((512, 512), 3.0 * step))
        # Restored arrays may be donated too.
        np.testing.assert_array_equal(bump(restored)["w"], np.full((512, 512), 3.0 * step + 1))


def test_newest_and_every_nth_checkpoints_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, *range(1, 12), save=Save(every=1, keep_last=2, keep_every=4))
    assert Store(tmp_path).steps() == [4, 8, 10, 11]


def test_save_is_due_by_steps_and_by_minutes(tmp_path: Path) -> None:
    with Store(tmp_path, Save(every=10, minutes=1.0)) as store:
        now = store._saved_at
        assert [step for step in range(1, 31) if store.due(step, now + 59)] == [10, 20, 30]
        assert store.due(7, now + 60)
        store.save(7, make_state(7))
        assert not store.due(8, now + 60)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every": 0}, "save.every=0"),
        ({"every": 10, "minutes": -1.0}, "save.minutes=-1.0"),
        ({"every": 10, "keep_last": 0}, "save.keep_last=0"),
        ({"every": 10, "keep_every": 15}, "multiple of save.every=10"),
    ],
)
def test_invalid_fields_raise_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Save(**fields)


def test_missing_checkpoint_raises_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint in"):
        Store(tmp_path / "none").restore_params()
    assert Store(tmp_path / "none").latest() is None
    assert not (tmp_path / "none").exists()
    save_steps(tmp_path, 5)
    with pytest.raises(UserError, match=r"step 4 in .*, only of 5"):
        Store(tmp_path).restore_params(4)


def test_error_for_a_checkpoint_of_another_model_names_the_first_difference(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    store = Store(tmp_path)
    with pytest.raises(
        UserError, match=r"params/.*\[2, 8, 24\] there and bfloat16\[2, 4, 24\] in the exp"
    ):
        store.restore(abstract(make_state(0, width=4)))
    state = abstract(make_state(0))
    more = state._replace(params={**state.params, "norm": jax.ShapeDtypeStruct((8,), "float32")})
    with pytest.raises(
        UserError, match="it has no params/norm; the experiment has params/norm: float32"
    ):
        store.restore(more)
    fewer = state._replace(params={"embed": state.params["embed"]})
    with pytest.raises(
        UserError, match=r"it has params/blocks/0/up: bfloat16.*; the experiment has no params/b"
    ):
        store.restore(fewer)
    with pytest.raises(UserError, match="params/norm is missing in checkpoint 1"):
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        store.restore_params(shardings=jax.tree.map(lambda _: first, more.params))


def test_folder_without_a_run_checkpoint_raises_an_error(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "model.bin").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="7"):
        Store(tmp_path).restore_params()
    with Store(tmp_path / "other", Save(every=1)) as store:
        store.save(1, {"weights": jnp.ones(3)})
    with pytest.raises(UserError, match="no parameters"):
        Store(tmp_path / "other").restore_params()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    save_steps(folder, 1, 2)
    return folder


@pytest.mark.parametrize(
    "left",
    [
        "half",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("nothing", "all but a byte", "no file")
        ),
    ],
)
def test_damaged_checkpoint_is_rejected_or_restores_correctly(
    two_saved: Path, tmp_path: Path, left: str
) -> None:
    """Damages each file in turn. Some files hold nothing that is needed, but no damage may lead to
    wrong numbers."""
    refused = 0
    shapes = abstract(make_state(0))
    for path in _files(two_saved / "2"):
        shutil.rmtree(tmp_path)
        shutil.copytree(two_saved, tmp_path)
        damaged = tmp_path / path.relative_to(two_saved)
        size = damaged.stat().st_size
        if left == "no file":
            damaged.unlink()
        else:
            os.truncate(
                damaged, {"nothing": 0, "half": size // 2, "all but a byte": size - 1}[left]
            )
        for read in (lambda s: s.restore(shapes, 2), lambda s: s.restore_params(2)):
            try:
                restored = read(Store(tmp_path))
            except UserError as refusal:
                refused += 1
                assert str(damaged.parent.relative_to(tmp_path)).startswith("2")
                assert "2" in str(refusal)
                if "cannot be read" in str(refusal):
                    assert "to resume from step 1, the previous checkpoint" in str(refusal)
            else:
                expected = make_state(2)
                assert_same(restored, expected if isinstance(restored, State) else expected.params)
        # The earlier checkpoint is unaffected.
        assert_same(Store(tmp_path).restore_params(1), make_state(1).params)
    assert refused >= 6  # at least the tree metadata, the index and the data, read both ways


def test_incomplete_save_is_not_listed_and_is_removed_by_a_writer(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    incomplete = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", incomplete)
    assert Store(tmp_path).steps() == [1]  # a reader neither lists nor removes it
    assert incomplete.exists()
    with Store(tmp_path, Save(every=1)) as store:
        assert not incomplete.exists()
        store.save(2, make_state(2))
    assert Store(tmp_path).steps() == [1, 2]


def test_failed_save_is_reported_and_keeps_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 1, save=Save(every=1, keep_last=1))
    store = Store(tmp_path, Save(every=1, keep_last=1))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(store._writer), "save_async", full)
    with pytest.raises(UserError, match=r"step 2 could not .* disk is full.* resumes from step 1"):
        store.save(2, make_state(2))
    monkeypatch.undo()
    store.close()
    assert_same(Store(tmp_path).restore_params(), make_state(1).params)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 2 MB. Skips the test if mounting is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs permission to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_is_reported_and_keeps_earlier_checkpoints(small_disk: Path) -> None:
    # Random numbers, since a constant would be compressed.
    states = [{"params": {"w": jax.random.normal(jax.random.key(i), (300_000,))}} for i in (0, 1)]
    store = Store(small_disk, Save(every=1, keep_last=1))
    store.save(1, states[0])
    store.wait()
    with pytest.raises(UserError, match=r"step 2 could.* disk is full.* resumes from step 1"):
        store.save(2, states[1])
        store.wait()
    assert Store(small_disk).steps() == [1]
    assert_same(Store(small_disk).restore_params(), states[0]["params"])
    assert not list(small_disk.glob("*tmp*"))
    store.close()


def _python(code: str, tmp_path: Path, devices: int = 1, **env: str) -> subprocess.Popen[str]:
    flags = virtual_devices.flags(devices)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


SAVE_ON_A_MESH = """
    import sys
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from lm.checkpoint import Save, Store
    from lm.parallel.mesh import Mesh

    mesh = Mesh(fsdp=4, tensor=2).build()
    w = np.arange(16 * 8, dtype=np.float32).reshape(16, 8) / 7
    put = lambda spec: jax.make_array_from_callback(
        w.shape, NamedSharding(mesh, spec), lambda i: w[i]
    )
    with Store(sys.argv[1], Save(every=1, keep_last=2)) as store:
        for step in (1, 2, 3):
            state = {"params": {"w": put(P("fsdp", "tensor"))}, "mu": put(P(None, "tensor"))}
            store.save(step, state, {"mesh": "fsdp=4,tensor=2"})
    assert store.steps() == [2, 3]
"""


def test_checkpoint_of_eight_devices_restores_on_one_device_and_on_other_meshes(
    tmp_path: Path,
) -> None:
    _finish(_python(SAVE_ON_A_MESH, tmp_path, devices=8))
    w = np.arange(16 * 8, dtype=np.float32).reshape(16, 8) / 7
    restored = Store(tmp_path).restore_params()["w"]
    np.testing.assert_array_equal(restored, w)
    assert len(restored.devices()) == 1
    read = """
        import sys
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from lm.checkpoint import Store
        from lm.parallel.mesh import Mesh

        store, w = Store(sys.argv[1]), np.arange(16 * 8, dtype=np.float32).reshape(16, 8) / 7
        for mesh in (Mesh(data=8), Mesh(fsdp=8), Mesh(tensor=8), Mesh(data=2, fsdp=2, tensor=2)):
            sharding = NamedSharding(mesh.build(), P("fsdp", "tensor"))
            abstract = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)
            state = store.restore({"params": {"w": abstract}, "mu": abstract})
            params = store.restore_params(shardings={"w": sharding})
            for x in (state["params"]["w"], state["mu"], params["w"]):
                assert x.sharding == sharding
                np.testing.assert_array_equal(x, w)
    """
    _finish(_python(read, tmp_path, devices=8))


@pytest.mark.slow
def test_two_processes_save_one_checkpoint(tmp_path: Path) -> None:
    """Each process has four of the eight devices; the result is one checkpoint."""
    start = "from lm.parallel import distributed; distributed.initialize()\n"
    port = 20_000 + os.getpid() % 10_000
    together = [
        _python(
            start + textwrap.dedent(SAVE_ON_A_MESH),
            tmp_path,
            devices=4,
            JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]
    for process in together:
        _finish(process)
    assert Store(tmp_path).steps() == [2, 3]
    w = np.arange(16 * 8, dtype=np.float32).reshape(16, 8) / 7
    np.testing.assert_array_equal(Store(tmp_path).restore_params()["w"], w)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_one_flipped_bit_changes_the_checksum(dtype: str) -> None:
    x = jnp.arange(24).reshape(2, 3, 4).astype(dtype)
    content = np.asarray(x).copy()
    flat = content.view(np.uint8).reshape(-1)
    (before,) = checksums({"x": x}).values()
    for position in range(flat.size):
        for bit in range(8):
            flat[position] ^= 1 << bit
            assert checksums({"x": content}) != {"x": before}
            flat[position] ^= 1 << bit
    assert checksums({"x": content}) == {"x": before}


@pytest.mark.parametrize(("file", "records"), [("orbax/checkpoint/writes.py", 0), ("mine.py", 1)])
def test_abandoned_orbax_task_logs_no_traceback(
    caplog: pytest.LogCaptureFixture, file: str, records: int
) -> None:
    """On a full disk several writes fail. `wait` raises the first error; asyncio logs the others
    when their tasks are garbage collected."""
    code: dict[str, Any] = {}
    exec(compile("async def write(): raise ValueError('RESOURCE_EXHAUSTED')", file, "exec"), code)

    async def abandon() -> None:
        asyncio.get_running_loop().create_task(code["write"]())
        await asyncio.sleep(0)

    asyncio.run(abandon())
    gc.collect()
    assert len(caplog.records) == records
