"""Grouped matmul on CPU and its reference: values, gradients and error messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from kernel_helpers import float32, jit, normal

from kernels_pallas import grouped_matmul
from kernels_pallas.grouped_matmul import reference, tiles

M, D, F, E = 20, 6, 5, 4
X, W = normal(0, M, D), normal(1, E, D, F)


def exact(x, w, sizes):
    """(sum of sin(y), its gradients with respect to x and w), one matmul per group, in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    value, dx, dw = 0.0, np.zeros_like(x), np.zeros_like(w)
    for e, end in enumerate(np.cumsum(sizes)):
        rows = slice(end - sizes[e], end)
        y = x[rows] @ w[e]
        value += np.sin(y).sum()
        dx[rows], dw[e] = np.cos(y) @ w[e].T, x[rows].T @ np.cos(y)
    return value, dx, dw


@pytest.fixture(
    scope="module",
    params=[(grouped_matmul, 512), (grouped_matmul, 3), (reference.grouped_matmul, 512)],
    ids=["one_tile", "tiles", "reference"],
)
def value_and_gradients(request):
    """Compiled once for all group sizes."""
    function, rows = request.param

    def loss(x, w, sizes):
        return jnp.sin(function(x, w, sizes)).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "ROWS", rows)
        sizes = jnp.zeros(E, jnp.int32)
        return jit(jax.value_and_grad(loss, (0, 1))).lower(X, W, sizes).compile()


@pytest.mark.parametrize(
    "sizes", [[5, 5, 5, 5], [20, 0, 0, 0], [0, 7, 0, 13], [3, 0, 9, 1], [0, 0, 0, 0]]
)
def test_equals_one_product_per_group(value_and_gradients, sizes):
    """Rows past the last group give zeros and get no gradient, even if they hold NaN."""
    x = jnp.asarray(np.where(np.arange(M)[:, None] < sum(sizes), X, np.nan))
    value, (dx, dw) = value_and_gradients(x, W, jnp.array(sizes, jnp.int32))
    want, want_dx, want_dw = exact(X, W, sizes)
    # Gradients of y are cosines, at most 1, and differ by as much as y does.
    y = tolerance.of_sum(D, X, W)
    np.testing.assert_allclose(value, want, rtol=0, atol=tolerance.of_sum(M * F, 1.0, inherited=y))
    dx_atol = tolerance.of_sum(F, 1.0, W, inherited=y * tolerance.largest(W))
    np.testing.assert_allclose(dx, want_dx, rtol=0, atol=dx_atol)
    dw_atol = tolerance.of_sum(M, X, 1.0, inherited=y * tolerance.largest(X))
    np.testing.assert_allclose(dw, want_dw, rtol=0, atol=dw_atol)
    np.testing.assert_array_equal(dx[sum(sizes) :], 0)


def test_keeps_the_dtype():
    x, w = np.asarray(X).astype(jnp.bfloat16), np.asarray(W).astype(jnp.bfloat16)
    y = grouped_matmul(jnp.asarray(x), jnp.asarray(w), jnp.full(E, 5))
    assert y.dtype == jnp.bfloat16
    x, w = float32(x, w)
    want = np.einsum("emd,edf->emf", x.reshape(E, 5, D), w).reshape(M, F)
    # Products of bfloat16 numbers are exact in float32; the result is rounded.
    atol = tolerance.of_sum(D, x, w)
    np.testing.assert_allclose(
        *float32(y), want, rtol=tolerance.unit_roundoff(jnp.bfloat16), atol=atol
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
def test_rejects_arguments_that_do_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        grouped_matmul(*arguments)
