"""Tests of errors, trees, mesh, sharding, precision and distributed, used by the rest of `lm`."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import virtual_devices
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from lm import precision, trees
from lm.errors import UserError, check_name, check_positive, nearest
from lm.parallel import distributed, mesh, sharding
from lm.parallel.mesh import AXES, Mesh, Place, choose

# ---- errors


def test_user_errors_contain_field_value_and_suggestion():
    with pytest.raises(
        UserError, match=r"^ffn.kind='swigl' is not known. Did you mean 'swiglu'\?$"
    ):
        check_name("ffn.kind", "swigl", ["swiglu", "mlp"])
    with pytest.raises(UserError, match=r"^x='q' is not known. Known: aa, bb.$"):
        check_name("x", "q", iter(["bb", "aa"]))
    check_name("x", "aa", iter(["aa"]))
    assert nearest("anything", []) == ""


@pytest.mark.parametrize("value", [0, -1, float("nan"), None, "3"])
def test_check_positive_rejects_all_but_numbers_above_zero(value):
    with pytest.raises(UserError, match="dim=.* must be above zero"):
        check_positive(vocab=1, dim=value)
    check_positive(dim=np.float32(0.5), vocab=1)


# ---- trees

KEYS = st.text("abc", min_size=1, max_size=2)
TREES = st.recursive(
    st.dictionaries(KEYS, st.integers(), min_size=1, max_size=3),
    lambda below: st.dictionaries(KEYS, st.integers() | below, min_size=1, max_size=3),
    max_leaves=8,
)


@given(TREES)
def test_unflatten_inverts_flatten(tree):
    assert trees.unflatten(trees.flatten(tree)) == tree


@given(TREES)
def test_map_with_path_passes_path_of_each_leaf(tree):
    flat = trees.flatten(tree)
    got = trees.map_with_path(lambda path, a, b: (path, a, b), tree, tree)
    assert trees.flatten(got) == {path: (path, x, x) for path, x in flat.items()}


def test_map_with_path_rejects_trees_of_different_structure():
    with pytest.raises(ValueError, match="a/b"):
        trees.map_with_path(lambda _, a, b: a, {"a": {"b": 1}}, {"a": {}})


def test_count_nbytes_and_global_norm():
    tree = {"a": jnp.full((2, 3), 2.0), "b": {"c": jnp.ones(4, jnp.bfloat16)}}
    assert trees.count(tree) == 10
    assert trees.nbytes(tree) == 2 * 3 * 4 + 4 * 2
    assert trees.nbytes(jax.eval_shape(lambda: tree)) == trees.nbytes(tree)
    # 6 * 2^2 + 4 * 1^2 = 28; the squares and their sum are exact, only the square root rounds.
    np.testing.assert_allclose(trees.global_norm(tree), np.sqrt(28), rtol=1e-7)
    assert trees.global_norm({}) == 0


# ---- mesh


def test_mesh_parse_inverts_str():
    assert Mesh.parse("data=2, fsdp=4") == Mesh(data=2, fsdp=4)
    assert str(Mesh()) == "data=1"
    for text in ("data=2,fsdp=2,tensor=2", "expert=4", "data=1"):
        assert str(Mesh.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("dat=2", "mesh axis='dat' is not known. Did you mean 'data'"),
        ("data", "'data' needs a whole number"),
        ("data=x", "needs a whole number"),
        ("data=-1", "needs a whole number"),
        ("data=0", "mesh.data=0 must be above zero"),
        ("data=2,data=4", "given twice"),
        ("", "mesh axis='' is not known"),
    ],
)
def test_invalid_mesh_raises_user_error(text, sentence):
    with pytest.raises(UserError, match=sentence):
        Mesh.parse(text)


def test_mesh_batch_size_excludes_tensor_axis():
    assert Mesh(data=2, fsdp=3, expert=5, tensor=7).batch_size == 30
    assert Mesh(data=2, fsdp=3, expert=5, tensor=7).size == 210


def test_mesh_is_built_over_first_devices_and_rejects_too_few():
    built = Mesh().build()
    assert built.axis_names == AXES
    assert built.devices.ravel().tolist() == jax.devices()[:1]
    assert set(built.axis_types) == {jax.sharding.AxisType.Auto}
    with pytest.raises(UserError, match="needs 64 devices and this machine has .*_device_count=64"):
        Mesh(data=64).build()


class Device:
    platform = "cpu"

    def __init__(self, process_index):
        self.process_index = process_index


def test_mesh_must_use_devices_of_every_host():
    with pytest.raises(UserError, match="leave some of the 2 hosts idle; choose a mesh of 4"):
        Mesh(data=2).build([Device(0), Device(0), Device(1), Device(1)])


def test_abstract_mesh_has_the_same_shape():
    wanted = Mesh(data=2, tensor=4)
    assert tuple(wanted.abstract().shape.values()) == wanted.shape
    assert tuple(wanted.abstract().shape) == AXES


def test_place_validates_its_fields():
    with pytest.raises(UserError, match="place.microbatches=0"):
        Place(microbatches=0)
    with pytest.raises(UserError, match="place.remat='blocks' is not known. Did you mean 'block'"):
        Place(remat="blocks")
    with pytest.raises(UserError, match="place.remat='qkw' is not known. Did you mean 'qkv'"):
        Place(remat=("attention", "qkw"))
    with pytest.raises(
        UserError, match="place.offload='optimiser' is not known. Did you mean 'opt"
    ):
        Place(offload=("optimiser",))
    with pytest.raises(UserError, match="'layers' is not supported with mesh.pipe=2"):
        Place(mesh=Mesh(pipe=2), microbatches=2, offload=("layers",))
    with pytest.raises(UserError, match="place.accumulate='float16' is not known"):
        Place(microbatches=2, accumulate="float16")
    with pytest.raises(UserError, match="place.accumulate='bfloat16' has no effect"):
        Place(accumulate="bfloat16")
    with pytest.raises(UserError, match=r"place.remat=\(\) names nothing to save; use 'block'"):
        Place(remat=())


PLACES = {
    "v5p-8": Place(),  # as many devices as this machine, which has no TPU
    "huge": Place(mesh=Mesh(data=4096)),
    "cpu": Place(microbatches=3),
    "other": Place(),
}


def test_choose_returns_first_place_that_fits():
    assert choose(PLACES) == ("cpu", PLACES["cpu"])
    assert choose(PLACES, on="huge") == ("huge", PLACES["huge"])
    name, place = choose(PLACES, on="cpu", mesh=Mesh(data=2))
    assert (name, place) == ("cpu", Place(microbatches=3, mesh=Mesh(data=2)))
    assert choose(PLACES, mesh=Mesh(data=2))[0] == "huge"
    with pytest.raises(UserError, match="--on='cpus' is not known. Did you mean 'cpu'"):
        choose(PLACES, on="cpus")
    with pytest.raises(UserError, match=r"No place fits .* v5p-8 \(1 devices\)"):
        choose({"v5p-8": Place()})


def test_tpu_places_are_recognized_by_name():
    names = ["v4-8", "v5e-16", "v5p-64", "v6e-256", "tpu7x-16"]
    assert all(mesh._TPU_PLACE.fullmatch(name) for name in names)
    assert not any(mesh._TPU_PLACE.fullmatch(name) for name in ["cpu", "h100-8", "v5p", "laptop"])


# ---- sharding

RULES = sharding.Rules()
EIGHT = Mesh(data=2, fsdp=2, tensor=2).abstract()


def test_weights_are_sharded_by_logical_axis_names():
    spec = RULES.weight(("layers", "embed", "heads", "head"), (3, 8, 4, 5), EIGHT)
    assert spec == PartitionSpec(None, ("fsdp",), ("tensor",), None)
    assert RULES.weight(("vocab", "embed"), (8, 8), EIGHT) == PartitionSpec(("tensor",), ("fsdp",))
    # Mesh axes of size 1 are omitted, so that specs of equal placement compare equal.
    one = Mesh().abstract()
    assert RULES.weight(("vocab", "embed"), (7, 5), one) == PartitionSpec(None, None)


def test_activations_are_sharded_over_all_batch_axes():
    spec = RULES.activation(("batch", "seq", "embed"), (4, 3, 5), EIGHT)
    assert spec == PartitionSpec(("data", "fsdp"), None, None)


def test_kv_heads_fewer_than_tensor_axis_are_replicated():
    tensor = Mesh(tensor=8).abstract()
    spec = RULES.weight(("embed", "kv_heads", "head"), (8, 2, 4), tensor)
    assert spec == PartitionSpec(None, None, None)
    with pytest.raises(UserError, match="kv_heads of size 3 does not divide over mesh tensor=8"):
        RULES.weight(("embed", "kv_heads", "head"), (8, 3, 4), tensor)


@pytest.mark.parametrize(
    ("axes", "shape", "sentence"),
    [
        (("embde",), (8,), "w has the unknown logical axis 'embde'. Did you mean 'embed'"),
        (("embed",), (8, 8), r"w has shape \(8, 8\) but axes \('embed',\)"),
        (("embed", "mlp"), (8, 7), "w: mlp of size 7 does not divide over mesh tensor=2; .* of 2"),
        (("heads", "mlp"), (8, 8), "'heads' and 'mlp' are both sharded over mesh axis 'tensor'"),
    ],
)
def test_invalid_sharding_raises_user_error(axes, shape, sentence):
    with pytest.raises(UserError, match=sentence):
        RULES.weight(axes, shape, EIGHT, "w")


def test_rules_reject_unknown_mesh_axes():
    with pytest.raises(
        UserError, match="rules\\['embed'\\]='fsdb' is not known. Did you mean 'fsdp'"
    ):
        sharding.Rules(weights={"embed": ("fsdb",)})


def test_sharding_tables_use_known_mesh_axes():
    for table in (sharding.WEIGHTS, sharding.ACTIVATIONS):
        assert {name for names in table.values() for name in names} <= set(AXES)
    assert set(sharding.MAY_REPLICATE) <= set(sharding.WEIGHTS)


def test_shard_checks_axis_names_with_and_without_mesh():
    x_bt = jnp.ones((2, 3))
    assert sharding.shard(x_bt, "batch", "seq") is x_bt
    assert sharding.active_mesh() is None
    built = Mesh().build()
    for context in (None, built):
        with pytest.raises(UserError, match="unknown logical axis 'bach'"):
            _sharded(context, x_bt, "bach", "seq")
        with pytest.raises(UserError, match="one name per dimension"):
            _sharded(context, x_bt, "batch")
    np.testing.assert_array_equal(_sharded(built, x_bt, "batch", "seq"), x_bt)
    with sharding.use(built):
        assert sharding.active_mesh() is built
    assert sharding.active_mesh() is None


def _sharded(built, x, *axes):
    if built is None:
        return sharding.shard(x, *axes)
    with sharding.use(built):
        return sharding.shard(x, *axes)


# ---- precision


def test_precision_casts_only_floating_point_leaves():
    tree = {"w": jnp.ones(2, jnp.float32), "n": jnp.ones(2, jnp.int32)}
    low = precision.BF16.to_compute(tree)
    assert (low["w"].dtype, low["n"].dtype) == (jnp.bfloat16, jnp.int32)
    assert precision.BF16.to_params(low)["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"compute": "bf16"}, "precision.compute='bf16' is not known. Did you mean 'bfloat16'"),
        ({"params": "int8"}, "precision.params='int8' is not known"),
        ({"compute": "float16"}, "needs precision.loss_scale"),
        ({"loss_scale": precision.LossScale()}, "has no use with precision.compute='float32'"),
    ],
)
def test_invalid_precision_raises_user_error(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        precision.Precision(**fields)
    with pytest.raises(UserError, match="growth_interval=0"):
        precision.LossScale(growth_interval=0)


# ---- distributed


def test_single_process_is_main_and_passes_barrier():
    distributed.barrier("alone")
    assert distributed.is_main()
    assert distributed.any_process(True)
    assert not distributed.any_process(False)


@pytest.mark.parametrize(
    ("environment", "called"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4"}, False),  # shell of an allocation, not a job step
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"JAX_PLATFORMS": "tpu", "TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"JAX_PLATFORMS": "tpu", "TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),  # JAX_PLATFORMS=cpu on the host of a TPU pod
    ],
)
def test_jax_distributed_is_initialized_only_with_several_hosts(environment, called, monkeypatch):
    calls = _initialize(environment, monkeypatch)
    assert bool(calls) == called


def test_environment_variables_set_coordinator_and_processes(monkeypatch):
    by_hand = {
        "JAX_COORDINATOR_ADDRESS": "host:1",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
    }
    assert _initialize(by_hand, monkeypatch) == [("host:1", 2, 1)]
    with pytest.raises(UserError, match="^JAX_PROCESS_ID must be set too"):
        _initialize({**by_hand, "JAX_PROCESS_ID": None}, monkeypatch)
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES='two' must be a whole number"):
        _initialize({**by_hand, "JAX_NUM_PROCESSES": "two"}, monkeypatch)
    with pytest.raises(UserError, match="JAX_PROCESS_ID=2 must be below JAX_NUM_PROCESSES=2"):
        _initialize({**by_hand, "JAX_PROCESS_ID": "2"}, monkeypatch)


def _initialize(environment, monkeypatch):
    """Returns the arguments of each call of jax.distributed.initialize in this environment."""
    calls = []
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_NUM", "JAX_PROC", "TPU_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *a: calls.append(a))
    monkeypatch.setattr(distributed, "_watch_peers", lambda: None)  # no peers to watch
    distributed.initialize()
    return calls


# ---- eight devices

ON_EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from lm.parallel import sharding
from lm.parallel.mesh import Mesh, choose, Place

assert jax.device_count() == 8
mesh = Mesh(data=2, fsdp=2, tensor=2).build()
# Devices adjacent on the last mesh axis are adjacent in the list of devices.
assert [d.id for d in mesh.devices[0, 0, 0, 0, 0]] == [0, 1]

@jax.jit
def double(x):
    return sharding.shard(2 * x, "batch", "seq", "embed")

x = jnp.arange(4 * 3 * 5.0).reshape(4, 3, 5)
with sharding.use(mesh):
    y = double(x)
np.testing.assert_array_equal(y, 2 * np.asarray(x))
assert {s.data.shape for s in y.addressable_shards} == {(1, 3, 5)}

axes = {"w": ("embed", "mlp"), "norm": {"scale": ("norm",)}}
init = lambda: {"w": jnp.ones((4, 6)), "norm": {"scale": jnp.ones(4)}}
shardings = sharding.weight_shardings(axes, jax.eval_shape(init), mesh)
born = jax.jit(init, out_shardings=shardings)()
assert born["w"].addressable_shards[0].data.shape == (2, 3)
assert born["norm"]["scale"].sharding.is_fully_replicated
tokens = jax.device_put(np.zeros((4, 3), np.int32), sharding.batch_sharding(mesh))
assert tokens.addressable_shards[0].data.shape == (1, 3)

# A smaller mesh uses the first devices; `choose` returns the first place that fits.
assert Mesh(data=4).build().devices.size == 4
places = {"v5p-8": Place(mesh=Mesh(data=8)), "nine": Place(mesh=Mesh(data=9)), "x": Place()}
assert choose(places)[0] == "x"
"""


def test_mesh_and_sharding_on_eight_devices():
    flags = virtual_devices.flags(8)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
