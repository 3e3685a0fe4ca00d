"""4-bit NormalFloat against bitsandbytes, and as the storage of frozen weights."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import model, quant, trees
from lm.quant import nf4

ORACLES = Path(__file__).parents[1] / "oracles"
sys.path.insert(0, str(ORACLES))
import tiny  # noqa: E402


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(tiny.RECORDED / "nf4.npz"))


def ours(**fields):
    """`tiny.matrix` quantized: its blocks of 64 are its rows, which are our columns."""
    matrix = jnp.asarray(tiny.matrix().reshape(-1, 64).T)
    return quant.NF4(block=64, **fields).quantize(matrix, ("embed", "mlp"))


def test_codes_scales_and_values_are_those_of_bitsandbytes(recorded):
    array = ours(double=False)
    np.testing.assert_array_equal(nf4.TABLE, recorded["table"])
    np.testing.assert_array_equal(np.asarray(array.codes).T.reshape(-1), recorded["plain/packed"])
    np.testing.assert_array_equal(array.scales[0], recorded["plain/absmax"])
    rows = recorded["plain/y"].reshape(-1, 64)
    np.testing.assert_array_equal(np.asarray(array.dense()).T[: len(rows)], rows)


def test_double_quantization_is_as_accurate_as_that_of_bitsandbytes(recorded):
    """The groups of both are different, their table is one."""
    np.testing.assert_allclose(nf4.dynamic_table(), recorded["double/nested_table"], atol=1e-7)
    exact, double = ours(double=False), ours(double=True)
    np.testing.assert_array_equal(double.codes, exact.codes)
    codes, of = recorded["double/absmax"], recorded["double/nested_table"]
    group = np.repeat(recorded["double/nested_absmax"], 256)[: len(codes)]
    theirs = of[codes] * group + recorded["double/offset"]
    error = np.abs(double._scales() - exact.scales)
    assert error.max() <= np.abs(theirs - recorded["plain/absmax"]).max()
    np.testing.assert_allclose(double.mean, recorded["double/offset"], rtol=1e-6)


def test_bits_per_weight():
    w = jnp.zeros((1024, 4096))
    sizes = {d: trees.nbytes(quant.NF4(double=d).quantize(w, ("embed", "mlp"))) for d in (0, 1)}
    assert 8 * sizes[0] / w.size == 4.5
    assert 8 * sizes[1] / w.size < 4.13


@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed"), ("layers", "embed", "heads")])
@pytest.mark.parametrize("double", [False, True])
def test_any_axis_and_zeros(axes, double):
    shape = {"embed": 32, "mlp": 24, "layers": 3, "heads": 8}
    w = jax.random.normal(jax.random.key(0), [shape[a] for a in axes])
    w = w.at[..., 0].set(0)
    array = quant.NF4(block=16, double=double).quantize(w, axes)
    assert array.shape == w.shape
    assert array.dense().dtype == w.dtype
    # The widest gap of the table is 0.304 of a block's largest value.
    limit = 0.16 * np.abs(w).max()
    assert np.abs(array.dense() - w).max() < limit
    if not double:
        again = quant.NF4(block=16, double=False).quantize(array.dense(), axes)
        np.testing.assert_array_equal(again.codes, array.codes)


def test_layers_are_quantized_apart():
    w = jax.random.normal(jax.random.key(0), (3, 32, 8)) * jnp.array([1, 10, 100])[:, None, None]
    axes = ("layers", "embed", "mlp")
    stack = quant.NF4(block=16).quantize(w, axes)
    for i in range(3):
        alone = quant.NF4(block=16).quantize(w[i : i + 1], axes)
        np.testing.assert_array_equal(stack.dense()[i], alone.dense()[0])


def test_a_product_and_its_gradient_are_those_of_the_dense_weight():
    base = model.Config(
        vocab=40,
        dim=16,
        layers=2,
        attention=model.GQA(heads=4, kv_heads=2, head_dim=8),
        ffn=model.SwiGLU(hidden=24),
    )
    config = dataclasses.replace(base, quant=quant.NF4(block=8))
    params = jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9))
    dense = model.merge(config, params)
    leaves = [x for x in jax.tree.leaves(params, is_leaf=trees.is_leaf) if trees.is_leaf(x)]
    assert len(leaves) == 7

    def loss(table, config, params):
        params = params | {"embed": {"table": table}}
        apply = model.Model(config, params)
        return jnp.sum(apply.logits(apply(tokens).hidden_btd) ** 2)

    table = params["embed"]["table"]
    (value, ours), (wanted_value, wanted) = (
        jax.jit(jax.value_and_grad(lambda t, p=p, c=c: loss(t, c, p)))(table)
        for c, p in ((config, params), (base, dense))
    )
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * np.abs(wanted).max())
