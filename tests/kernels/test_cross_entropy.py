"""Chunked cross-entropy equals full logits, values and gradients, and never materializes them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from kernel_helpers import float32, integers, jit, normal, uniform

from kernels_pallas import cross_entropy, token_losses
from kernels_pallas.cross_entropy import op, reference

B, T, D, V = 3, 11, 8, 29


def inputs(b=B, t=T, d=D, v=V):
    """x_btd, w_dv, targets_bt and weights_bt, with weight 0 for every fourth token."""
    weights = uniform(3, b, t) * (np.arange(t) % 4 > 0)
    return normal(0, b, t, d), normal(1, d, v), integers(2, 0, v, b, t), weights


ALL = {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.2}
CHUNKS = [(None, None), (1, None), (4, None), (50, None), (None, 8), (4, 10), (2, 29)]
# (chunk, vocab_chunk), options
CASES = [
    *((chunks, options) for chunks in CHUNKS for options in ({}, ALL)),
    *(((4, size), {name: ALL[name]}) for size in (None, 10) for name in ALL),
]
QUICK = [((None, None), ALL), ((4, None), {}), ((4, None), ALL), ((None, 8), ALL), ((4, 10), ALL)]


def value_and_gradients(function, options, x, w, targets, weights):
    """((loss_sum, nll_sum), (dx, dw, dweights)) of a combination of both sums."""

    def loss(x, w, weights):
        loss, nll = function(x, w, targets, weights, **options)
        return 0.3 * loss + 2.0 * nll, (loss, nll)

    (_, sums), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, w, weights)
    return sums, gradients


@functools.cache
def expected(options):
    """By full logits; `options` are the items of a dict."""
    run = functools.partial(value_and_gradients, reference.cross_entropy, dict(options))
    return jit(run)(*inputs())


@pytest.mark.parametrize(
    ("chunks", "options"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id=f"{case}")
        for case in CASES
    ],
)
def test_equals_full_logits(chunks, options):
    arguments = inputs()
    x, w, _, weights = arguments
    chunked = functools.partial(cross_entropy, chunk=chunks[0], vocab_chunk=chunks[1])
    sums, gradients = jit(functools.partial(value_and_gradients, chunked, options))(*arguments)
    want_sums, want_gradients = expected(tuple(options.items()))
    # Each loss is a difference of logits and of their log-sum-exp over V.
    logit = tolerance.of_sum(D, x, w)
    largest_logit = tolerance.largest(np.asarray(x) @ np.asarray(w))
    loss = 2 * logit + tolerance.of_sum(V, 1.0)
    if "z_loss" in options:
        loss *= 1 + 2 * options["z_loss"] * largest_logit
    np.testing.assert_allclose(
        sums,
        want_sums,
        rtol=0,
        atol=tolerance.of_sum(B * T, weights, largest_logit, inherited=loss),
    )
    for got, want, terms in zip(gradients[:2], want_gradients[:2], (V, B * T), strict=True):
        # Softmax weights amplify errors of logits by their size.
        atol = tolerance.of_chain(want, terms, V, D * largest_logit**2)
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)
    np.testing.assert_allclose(gradients[2], want_gradients[2], rtol=0, atol=loss)


@pytest.mark.parametrize(("chunk", "vocab_chunk"), [(None, None), (4, None), (4, 10)])
def test_token_losses(chunk, vocab_chunk):
    """With gradients of a sum that weighs tokens by either sign."""
    x, w, targets, _ = inputs()
    weights = normal(4, B, T)

    def run(function, x, w):
        def total(x, w):
            losses = function(x, w, targets, softcap=3.0)
            return jnp.sum(weights * losses), losses

        gradients, losses = jax.grad(total, (0, 1), has_aux=True)(x, w)
        return losses, *gradients

    chunked = functools.partial(token_losses, chunk=chunk, vocab_chunk=vocab_chunk)
    got, want = (jit(functools.partial(run, f))(x, w) for f in (chunked, reference.token_losses))
    atol = 2 * tolerance.of_sum(D, x, w) + tolerance.of_sum(V, 1.0)
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=atol)
    largest_logit = tolerance.largest(np.asarray(x) @ np.asarray(w))
    for a, b, terms in zip(got[1:], want[1:], (V, B * T), strict=True):
        atol = tolerance.of_chain(b, terms, V, D * largest_logit**2)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def test_the_value_is_the_same_with_and_without_gradients():
    x, w, targets, weights = inputs()

    def loss(x):
        return cross_entropy(x, w, targets, weights, z_loss=0.1, chunk=4)

    @jit
    def both(x):
        return loss(x), jax.vjp(loss, x)[0]

    for plain, with_gradients in zip(*both(x), strict=True):
        np.testing.assert_allclose(with_gradients, plain, rtol=1e-6)


def test_another_platform_takes_other_chunks(monkeypatch):
    """The program of an accelerator, lowered for CPU."""
    x, w, targets, weights = inputs()

    def losses(chunk):
        monkeypatch.setattr(op, "_on_cpu", lambda *sizes: chunk)
        monkeypatch.setattr(op, "_elsewhere", lambda *sizes: op.Chunk(T, V))

        @jit
        def run(x, w):
            loss = lambda x, w: cross_entropy(x, w, targets, weights)[0]  # noqa: E731
            return jax.value_and_grad(loss, (0, 1))(x, w), token_losses(x, w, targets)

        return jax.tree.leaves(run(x, w))

    largest_logit = tolerance.largest(np.asarray(x) @ np.asarray(w))
    for a, b in zip(losses(op.Chunk(2, V)), losses(op.Chunk(T, 8)), strict=True):
        atol = tolerance.of_chain(b, B * T, V, D * largest_logit**2)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def test_chunks_chosen_for_accelerators():
    """Chunks limit the memory of logits and of the unembedding gradient, down to the smallest
    efficient matmul."""
    assert op._elsewhere(4, 4096, 4096, 128_256) == op.Chunk(4096, 8064)
    assert op._elsewhere(1, 512, 8192, 128_256) == op.Chunk(512, 16_128)
    assert op._elsewhere(1, 131_072, 4096, 128_256) == op.Chunk(16_644, 8064)
    assert op._elsewhere(8, 1024, 768, 16_000) == op.Chunk(1024, 16_000)
    assert op._elsewhere(1024, 4096, 4096, 128_256) == op.Chunk(128, 8064)


def test_bfloat16():
    x, w, targets, weights = inputs()
    low = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)

    @jit
    def value_and_gradients(x, w):
        def loss(x, w):
            return cross_entropy(x, w, targets, weights, chunk=4)[0]

        return jax.value_and_grad(loss, (0, 1))(x, w)

    value, gradients = value_and_gradients(*low)
    want, want_gradients = value_and_gradients(*float32(*low))
    assert value.dtype == jnp.float32
    # Products of bfloat16 numbers are exact in float32 and are summed in float32.
    loss = 2 * tolerance.of_sum(D, *low) + tolerance.of_sum(V, 1.0)
    largest_logit = tolerance.largest(np.asarray(x) @ np.asarray(w))
    atol = tolerance.of_sum(B * T, weights, largest_logit, inherited=loss)
    np.testing.assert_allclose(value, want, rtol=0, atol=atol)
    for a, b in zip(gradients, want_gradients, strict=True):
        assert a.dtype == jnp.bfloat16
        # Gradients of logits and results are rounded.
        atol = tolerance.of_chain(b, V, D * largest_logit**2, roundings=4, dtype=jnp.bfloat16)
        np.testing.assert_allclose(*float32(a, b), rtol=0, atol=atol)


def test_vocabulary_chunks_never_materialize_the_unembedding_gradient():
    b, t, d, v = 1, 32, 64, 4096
    x, w, targets, weights = inputs(b, t, d, v)
    low = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)

    def matmul_shapes(vocab_chunk):
        def loss(x, w):
            return cross_entropy(x, w, targets, weights, chunk=t, vocab_chunk=vocab_chunk)[0]

        text = jit(jax.grad(loss, (0, 1))).lower(*low).as_text()
        return re.findall(r"dot_general.*-> tensor<(.*)>", text)

    assert f"{d}x{v}xf32" in matmul_shapes(None)
    assert f"{d}x{v}xf32" not in matmul_shapes(512)
    assert f"{d}x512xf32" in matmul_shapes(512)


def test_full_logits_are_never_materialized():
    b, t, d, v = 2, 256, 16, 512
    x, w, targets, weights = inputs(b, t, d, v)

    def loss(x, w):
        return cross_entropy(x, w, targets, weights, chunk=16)[0]

    memory = jit(jax.grad(loss, (0, 1))).lower(x, w).compile().memory_analysis()
    logits_of_a_chunk = 4 * b * 16 * v
    # A few arrays of the size of a chunk and of the inputs; full logits would take 16 chunks.
    inputs_size = x.nbytes + w.nbytes
    assert memory.temp_size_in_bytes < 4 * logits_of_a_chunk + 4 * inputs_size < 4 * b * t * v


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w_dv": np.zeros((D + 1, V))}, "must share the width D"),
        ({"targets_bt": np.zeros((B, T - 1), int)}, "targets_bt"),
        ({"targets_bt": np.zeros((B, T))}, "needs integers"),
        ({"weights_bt": np.zeros((B, T - 1))}, "weights_bt"),
        ({"softcap": -1.0}, "softcap=-1.0 must be positive"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5 must lie between 0 and 1"),
        ({"vocab_axis": "tensor"}, "vocab_axis='tensor' is not an axis of a surrounding"),
        ({"embed_axes": ("fsdp",)}, "embed_axes=.'fsdp',. is not an axis of a surrounding"),
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"vocab_chunk": 0}, "vocab_chunk=0 must be at least 1"),
    ],
)
def test_rejects_arguments_that_do_not_fit(change, words):
    x, w, targets, weights = inputs()
    arguments = {"x_btd": x, "w_dv": w, "targets_bt": targets, "weights_bt": weights}
    with pytest.raises(ValueError, match=words):
        cross_entropy(**(arguments | change))


@pytest.mark.parametrize("chunks", [(4, None), (4, 10)])
def test_a_frozen_output_matrix_costs_no_gradient(chunks):
    """The gradient of x is the same, and no array of the size of w is computed."""
    x, w, targets, weights = inputs()
    sizes = dict(zip(("chunk", "vocab_chunk"), chunks, strict=True))

    def loss(x, w):
        return cross_entropy(x, w, targets, weights, **sizes)[0]

    def losses(x, w):
        return jnp.sum(weights * token_losses(x, w, targets, **sizes))

    for function in (loss, losses):
        alone = jax.grad(function)
        wanted = jax.jit(jax.grad(function, (0, 1)))(x, w)[0]
        np.testing.assert_allclose(jax.jit(alone)(x, w), wanted, rtol=1e-6, atol=1e-7)
        products = re.findall(
            r"dot_general.* -> tensor<(\S+)xf32>", jit(alone).lower(x, w).as_text()
        )
        assert products
        assert not [shape for shape in products if shape in (f"{D}x{V}", f"{D}x10")]
