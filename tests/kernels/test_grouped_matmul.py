"""The grouped product equals one product per group, values and gradients, and refuses in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_matmul
from kernels_pallas.grouped_matmul import reference, tiles

M, D, F, E = 20, 6, 5, 4
X = jax.random.normal(jax.random.key(0), (M, D))
W = jax.random.normal(jax.random.key(1), (E, D, F))


def one_by_one(x, w, sizes):
    ends = np.cumsum(sizes)
    parts = [x[end - size : end] @ w[e] for e, (end, size) in enumerate(zip(ends, sizes))]
    return jnp.concatenate([*parts, jnp.zeros((M - ends[-1], F))])


@pytest.mark.parametrize(
    "sizes", [[5, 5, 5, 5], [20, 0, 0, 0], [0, 7, 0, 13], [3, 0, 9, 1], [0, 0, 0, 0]]
)
@pytest.mark.parametrize(
    ("function", "rows"),
    [(grouped_matmul, 512), (grouped_matmul, 3), (reference.grouped_matmul, 512)],
    ids=["one_tile", "tiles", "reference"],
)
def test_equals_one_product_per_group(function, rows, sizes, monkeypatch):
    """Rows past the last group give zeros and no gradient, whatever lies in them."""
    monkeypatch.setattr(tiles, "ROWS", rows)
    inside = jnp.arange(M)[:, None] < sum(sizes)
    x = jnp.where(inside, X, jnp.nan)

    def loss(function, x, w):
        return jnp.sin(function(x, w, jnp.array(sizes))).sum()

    got, got_gradients = jax.jit(jax.value_and_grad(lambda *a: loss(function, *a), (0, 1)))(x, W)
    want, want_gradients = jax.value_and_grad(
        lambda *a: loss(lambda x, w, _: one_by_one(x, w, sizes), *a), (0, 1)
    )(jnp.where(inside, X, 0), W)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(got_gradients, want_gradients):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got_gradients[0][sum(sizes) :], 0)


def test_keeps_the_dtype():
    half = grouped_matmul(X.astype(jnp.bfloat16), W.astype(jnp.bfloat16), jnp.full(E, 5))
    assert half.dtype == jnp.bfloat16
    # Inputs of 8 bits: each of the two factors rounds by up to 2**-9.
    np.testing.assert_allclose(
        half.astype(jnp.float32), grouped_matmul(X, W, jnp.full(E, 5)), rtol=0.02, atol=0.05
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((X[0], W, jnp.full(E, 5)), r"x \[M, D\]"),
        ((X[:, :3], W, jnp.full(E, 5)), "width 3"),
        ((X, W, jnp.full(E + 1, 4)), "4 groups but group_sizes has 5"),
        ((X.astype(jnp.bfloat16), W, jnp.full(E, 5)), "bfloat16 but w is float32"),
        ((X, W, jnp.full(E, 5.0)), "integers"),
    ],
)
def test_refuses_what_does_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        grouped_matmul(*arguments)
