"""Cross-entropy in chunks of positions and words equals whole logits, values and gradients, and
never holds them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import cross_entropy, token_losses
from kernels_pallas.cross_entropy import op, reference

B, T, D, V = 3, 11, 8, 29


def inputs(b=B, t=T, d=D, v=V):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (b, t, d))
    w = jax.random.normal(keys[1], (d, v))
    targets = jax.random.randint(keys[2], (b, t), 0, v)
    weights = jax.random.uniform(keys[3], (b, t)) * (jnp.arange(t) % 4 > 0)
    return x, w, targets, weights


ALL = {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.2}
CHUNKS = [(None, None), (1, None), (4, None), (50, None), (None, 8), (4, 10), (2, 29)]


@pytest.mark.parametrize(
    ("chunks", "options"),
    [
        *((chunks, options) for chunks in CHUNKS for options in ({}, ALL)),
        *(((4, size), {name: ALL[name]}) for size in (None, 10) for name in ALL),
    ],
    ids=str,
)
def test_equals_whole_logits(chunks, options):
    x, w, targets, weights = inputs()
    chunked = partial(cross_entropy, chunk=chunks[0], vocab_chunk=chunks[1])

    @partial(jax.jit, static_argnums=0)
    def both(function, x, w, weights):
        def loss(x, w, weights):
            loss, nll = function(x, w, targets, weights, **options)
            return 0.3 * loss + 2.0 * nll, (loss, nll)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, w, weights)

    (_, got), got_gradients = both(chunked, x, w, weights)
    (_, want), want_gradients = both(reference.cross_entropy, x, w, weights)
    # Sums over 29 words and 33 tokens of numbers below 100, in float32 and another order.
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(got_gradients[:2], want_gradients[:2], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(got_gradients[2], want_gradients[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("chunk", "vocab_chunk"), [(None, None), (4, None), (4, 10)])
def test_token_losses(chunk, vocab_chunk):
    x, w, targets, weights = inputs()
    got = token_losses(x, w, targets, softcap=3.0, chunk=chunk, vocab_chunk=vocab_chunk)
    np.testing.assert_allclose(got, reference.token_losses(x, w, targets, softcap=3.0), rtol=1e-5)
    nll_sum = cross_entropy(x, w, targets, weights, softcap=3.0)[1]
    np.testing.assert_allclose(jnp.sum(got * weights), nll_sum, rtol=1e-5)


def test_the_gradient_without_grad_is_the_same_sum():
    x, w, targets, weights = inputs()
    plain = cross_entropy(x, w, targets, weights, z_loss=0.1, chunk=4)
    for want, got in zip(
        plain,
        jax.vjp(lambda x: cross_entropy(x, w, targets, weights, z_loss=0.1, chunk=4), x)[0],
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_another_platform_takes_other_chunks(monkeypatch):
    """What a TPU would run, lowered for this machine."""
    x, w, targets, weights = inputs()

    def losses(form):
        monkeypatch.setattr(op, "_on_cpu", form)
        monkeypatch.setattr(op, "_elsewhere", lambda *sizes: op.Chunk(T, V))
        grad = jax.value_and_grad(lambda x, w: cross_entropy(x, w, targets, weights)[0], (0, 1))
        return jax.jit(grad)(x, w), token_losses(x, w, targets)

    one, other = (
        losses(lambda *sizes, form=form: form) for form in [op.Chunk(2, V), op.Chunk(T, 8)]
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_chunks_chosen_for_accelerators():
    """Neither logits nor the gradient of the unembedding are many numbers at a time, unless a
    product would become too small."""
    assert op._elsewhere(4, 4096, 4096, 128_256) == op.Chunk(4096, 8064)
    assert op._elsewhere(1, 512, 8192, 128_256) == op.Chunk(512, 16_128)
    assert op._elsewhere(1, 131_072, 4096, 128_256) == op.Chunk(16_644, 8064)
    assert op._elsewhere(8, 1024, 768, 16_000) == op.Chunk(1024, 16_000)
    assert op._elsewhere(1024, 4096, 4096, 128_256) == op.Chunk(128, 8064)


def test_bfloat16():
    x, w, targets, weights = inputs()
    low = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)

    def loss(x, w):
        return cross_entropy(x, w, targets, weights, chunk=4)[0]

    value, gradients = jax.value_and_grad(loss, (0, 1))(*low)
    exact = [a.astype(jnp.float32) for a in low]
    want, want_gradients = jax.value_and_grad(loss, (0, 1))(*exact)
    assert value.dtype == jnp.float32
    # Products of bfloat16 are exact in float32 and are summed there.
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for a, b in zip(gradients, want_gradients, strict=True):
        assert a.dtype == jnp.bfloat16
        # dz and the result are each rounded to 8 bits.
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2**-6 * float(jnp.abs(b).max()))


def test_with_words_in_chunks_the_gradient_of_the_unembedding_is_never_whole():
    b, t, d, v = 1, 32, 64, 4096
    x, w, targets, weights = inputs(b, t, d, v)
    low = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)

    def products(vocab_chunk):
        def loss(x, w):
            return cross_entropy(x, w, targets, weights, chunk=t, vocab_chunk=vocab_chunk)[0]

        text = jax.jit(jax.grad(loss, (0, 1))).lower(*low).as_text()
        return re.findall(r"dot_general.*-> tensor<(.*)>", text)

    assert f"{d}x{v}xf32" in products(None)
    assert f"{d}x{v}xf32" not in products(512)
    assert f"{d}x512xf32" in products(512)


def test_whole_logits_are_never_alive():
    b, t, d, v = 2, 256, 16, 512
    x, w, targets, weights = inputs(b, t, d, v)

    def loss(x, w):
        return cross_entropy(x, w, targets, weights, chunk=16)[0]

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile().memory_analysis()
    logits_of_a_chunk = 4 * b * 16 * v
    # A few arrays of the chunk's size and of the inputs' size; whole logits would take 16 chunks.
    inputs_size = x.nbytes + w.nbytes
    assert memory.temp_size_in_bytes < 4 * logits_of_a_chunk + 4 * inputs_size < 4 * b * t * v


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w_dv": np.zeros((D + 1, V))}, "must share the width D"),
        ({"targets_bt": np.zeros((B, T - 1), int)}, "targets_bt"),
        ({"targets_bt": np.zeros((B, T))}, "needs integers"),
        ({"weights_bt": np.zeros((B, T - 1))}, "weights_bt"),
        ({"softcap": -1.0}, "softcap=-1.0 must be above zero"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5 must lie between 0 and 1"),
        ({"vocab_axis": "tensor"}, "vocab_axis='tensor' is no axis of a shard_map"),
        ({"embed_axes": ("fsdp",)}, "embed_axes=.'fsdp',. is no axis of a shard_map"),
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"vocab_chunk": 0}, "vocab_chunk=0 must be at least 1"),
    ],
)
def test_refuses_in_words(change, words):
    x, w, targets, weights = inputs()
    arguments = {"x_btd": x, "w_dv": w, "targets_bt": targets, "weights_bt": weights}
    with pytest.raises(ValueError, match=words):
        cross_entropy(**(arguments | change))
