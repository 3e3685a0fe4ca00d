"""Cross-entropy in chunks of positions: the logits of one chunk live at a time, and only once.

The loss is the end of the forward pass, so its gradients are computed in the same loop from the
same logits and wait, as small as the hidden states and the unembedding, for the backward pass to
scale them (Liger, arXiv:2410.10989).
"""

from functools import partial

import jax
import jax.numpy as jnp

# Logits of a chunk, in numbers. A chunk of this size stays near the processor's caches.
CHUNK_LOGITS = 2**21
MIN_CHUNK = 32


def cross_entropy(
    x_btd: jax.Array,
    w_dv: jax.Array,
    targets_bt: jax.Array,
    weights_bt: jax.Array,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums over all tokens of the loss and of its first part.

    loss = nll + z_loss * lse ** 2, where lse is the log of the softmax's denominator (PaLM,
    arXiv:2204.02311).

    Args:
      x_btd: hidden states, any float dtype.
      w_dv: unembedding.
      targets_bt: integer targets in 0..V-1, also where the weight is zero.
      weights_bt: weight of each token; 0 leaves it out.
      softcap: logits become softcap * tanh(logits / softcap).
      z_loss: its coefficient.
      chunk: positions handled at a time; None chooses.

    Returns:
      (loss_sum, nll_sum) in float32. Gradients flow through loss_sum, to x, w and the weights;
      nll_sum is for reporting.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    chunk = _check(x_btd, w_dv, targets_bt, softcap, chunk)
    if weights_bt.shape != targets_bt.shape:
        raise ValueError(f"weights_bt {weights_bt.shape} must match targets_bt {targets_bt.shape}.")
    weights_bt = weights_bt.astype(jnp.float32)
    loss_sum, nll_sum = _sums(softcap, z_loss, chunk, x_btd, w_dv, targets_bt, weights_bt)
    return loss_sum, jax.lax.stop_gradient(nll_sum)


def token_losses(
    x_btd: jax.Array,
    w_dv: jax.Array,
    targets_bt: jax.Array,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """nll_bt of each token in float32, for evaluation; arguments as in `cross_entropy`."""
    chunk = _check(x_btd, w_dv, targets_bt, softcap, chunk)

    def body(_, inputs):
        x, targets = inputs
        z, lse = _logits(x, w_dv, softcap)
        return None, lse - _pick(z, targets)

    _, nll = jax.lax.scan(body, None, (_split(x_btd, chunk), _split(targets_bt, chunk)))
    return _join(nll, targets_bt.shape[1])


def _check(x_btd, w_dv, targets_bt, softcap, chunk) -> int:
    """Raises ValueError on shapes that do not fit; returns the chunk to use."""
    if x_btd.ndim != 3 or w_dv.ndim != 2 or x_btd.shape[-1] != w_dv.shape[0]:
        raise ValueError(f"x_btd {x_btd.shape} and w_dv {w_dv.shape} must share the width D.")
    if targets_bt.shape != x_btd.shape[:2]:
        raise ValueError(f"targets_bt {targets_bt.shape} must match x_btd {x_btd.shape}.")
    if not jnp.issubdtype(targets_bt.dtype, jnp.integer):
        raise ValueError(f"targets_bt is {targets_bt.dtype}; it needs integers.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be above zero; None turns it off.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1; None chooses.")
    b, t = targets_bt.shape
    if chunk is None:
        chunk = max(MIN_CHUNK, CHUNK_LOGITS // (b * w_dv.shape[1]))
    return min(chunk, t)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(softcap, z_loss, chunk, x_btd, w_dv, targets_bt, weights_bt):
    def body(sums, inputs):
        x, targets, weights = inputs
        z, lse = _logits(x, w_dv, softcap)
        nll = lse - _pick(z, targets)
        loss = nll + z_loss * lse**2
        return (sums[0] + jnp.sum(weights * loss), sums[1] + jnp.sum(weights * nll)), None

    chunks = tuple(_split(a, chunk) for a in (x_btd, targets_bt, weights_bt))
    return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), chunks)[0]


def _sums_forward(softcap, z_loss, chunk, x_btd, w_dv, targets_bt, weights_bt):
    """The sums, and the gradients of loss_sum for the backward pass."""

    def body(carry, inputs):
        loss_sum, nll_sum, dw_dv = carry
        x, targets, weights = inputs
        z, lse = _logits(x, w_dv, softcap)
        nll = lse - _pick(z, targets)
        loss = nll + z_loss * lse**2
        hot = targets[..., None] == jnp.arange(z.shape[-1])
        p = jnp.exp(z - lse[..., None])
        dz = weights[..., None] * (p * (1 + 2 * z_loss * lse[..., None]) - hot)
        if softcap is not None:
            dz *= 1 - (z / softcap) ** 2
        dz = dz.astype(x.dtype)
        dx = jnp.einsum("btv,dv->btd", dz, w_dv)
        dw_dv += jnp.einsum("btd,btv->dv", x, dz, preferred_element_type=jnp.float32)
        sums = loss_sum + jnp.sum(weights * loss), nll_sum + jnp.sum(weights * nll)
        return (*sums, dw_dv), (dx, loss)

    chunks = tuple(_split(a, chunk) for a in (x_btd, targets_bt, weights_bt))
    start = jnp.float32(0), jnp.float32(0), jnp.zeros(w_dv.shape, jnp.float32)
    (loss_sum, nll_sum, dw_dv), (dx, loss) = jax.lax.scan(body, start, chunks)
    t = targets_bt.shape[1]
    kept = _join(dx, t), dw_dv.astype(w_dv.dtype), _join(loss, t)
    return (loss_sum, nll_sum), kept


def _sums_backward(softcap, z_loss, chunk, kept, cotangents):
    dx_btd, dw_dv, loss_bt = kept
    g, _ = cotangents
    return (g * dx_btd).astype(dx_btd.dtype), (g * dw_dv).astype(dw_dv.dtype), None, g * loss_bt


_sums.defvjp(_sums_forward, _sums_backward)


def _logits(x, w_dv, softcap):
    """(logits, log of the softmax's denominator) of one chunk, in float32."""
    z = jnp.einsum("btd,dv->btv", x, w_dv, preferred_element_type=jnp.float32)
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    return z, jax.nn.logsumexp(z, axis=-1)


def _pick(z, targets):
    return jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]


def _split(x_bt, chunk):
    """[B, T, ...] -> [chunks, B, chunk, ...], zeros appended to the last chunk."""
    b, t = x_bt.shape[:2]
    short = -t % chunk
    if short:
        x_bt = jnp.pad(x_bt, [(0, 0), (0, short)] + [(0, 0)] * (x_bt.ndim - 2))
    return jnp.moveaxis(x_bt.reshape(b, -1, chunk, *x_bt.shape[2:]), 1, 0)


def _join(chunks, t):
    """[chunks, B, chunk, ...] -> [B, T, ...]."""
    x_bt = jnp.moveaxis(chunks, 0, 1)
    return x_bt.reshape(x_bt.shape[0], -1, *x_bt.shape[3:])[:, :t]
