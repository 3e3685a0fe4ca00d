"""Cross-entropy in chunks of positions: the logits of one chunk live at a time, and only once.

The loss is the end of the forward pass, so its gradients are computed in the same loop from the
same logits and wait, as small as the hidden states and the unembedding, for the backward pass to
scale them (Liger, arXiv:2410.10989).

It is plain JAX on every platform. A kernel that keeps the logits on the chip would have to compute
them twice, eight products of [tokens, D, V] in place of six, which costs about what it saves.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.varying import varying_alike, varying_axes, varying_over

# Logits of a chunk, in numbers, and positions at least. On CPU a chunk stays near the caches.
# Elsewhere each chunk reads and writes the float32 gradient of the unembedding once, against which
# a chunk needs about a thousand tokens on a device.
CHUNK_LOGITS = {"cpu": 2**21, "default": 2**27}
MIN_CHUNK = {"cpu": 32, "default": 128}


class Options(NamedTuple):
    """What is known when tracing; `cross_entropy` says what each is."""

    softcap: float | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    vocab_axis: str | None = None


def cross_entropy(
    x_btd: jax.Array,
    w_dv: jax.Array,
    targets_bt: jax.Array,
    weights_bt: jax.Array,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    vocab_axis: str | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums over all tokens of the loss and of its first part, nll.

    loss = nll + z_loss * lse ** 2, where lse is the log of the softmax's denominator (PaLM,
    arXiv:2204.02311). With label_smoothing = e, nll counts 1 - e in the loss, and the mean of
    -log p over the vocabulary e (Szegedy et al., arXiv:1512.00567).

    Args:
      x_btd: hidden states, any float dtype.
      w_dv: unembedding.
      targets_bt: integer targets in 0..V-1, also where the weight is zero.
      weights_bt: weight of each token; 0 leaves it out.
      softcap: logits become softcap * tanh(logits / softcap).
      z_loss: its coefficient.
      label_smoothing: e, from 0 to 1.
      vocab_axis: inside `jax.shard_map` (whose check_vma stays on), the mesh axis over which the
        vocabulary is divided: w_dv is then this device's part and the targets count over all parts.
        Statistics of tokens are exchanged, and the gradient of x, but no logits.
      chunk: positions handled at a time; None chooses.

    Returns:
      (loss_sum, nll_sum) in float32. Gradients flow through loss_sum, to x, w and the weights;
      nll_sum is for reporting.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    _check(x_btd, w_dv, targets_bt, softcap, chunk)
    if weights_bt.shape != targets_bt.shape:
        raise ValueError(f"weights_bt {weights_bt.shape} must match targets_bt {targets_bt.shape}.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing} must lie between 0 and 1.")
    options = Options(softcap, z_loss, label_smoothing, vocab_axis)
    arrays = x_btd, w_dv, targets_bt, weights_bt.astype(jnp.float32)
    loss_sum, nll_sum = _sums(options, chunk, *_varying(arrays, vocab_axis))
    return loss_sum, jax.lax.stop_gradient(nll_sum)


def token_losses(
    x_btd: jax.Array,
    w_dv: jax.Array,
    targets_bt: jax.Array,
    *,
    softcap: float | None = None,
    vocab_axis: str | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """nll_bt of each token in float32, for evaluation; arguments as in `cross_entropy`."""
    _check(x_btd, w_dv, targets_bt, softcap, chunk)
    options = Options(softcap=softcap, vocab_axis=vocab_axis)

    def by(x_btd, w_dv, targets_bt, chunk):
        def body(_, inputs):
            x, targets = inputs
            z, lse = _logits(x, w_dv, options)
            return None, lse - _pick(z, targets, options)

        _, nll = jax.lax.scan(body, None, (_split(x_btd, chunk), _split(targets_bt, chunk)))
        return _join(nll, targets_bt.shape[1])

    return _in_chunks(by, chunk, *_varying((x_btd, w_dv, targets_bt), vocab_axis))


def _check(x_btd, w_dv, targets_bt, softcap, chunk) -> None:
    """Raises ValueError on shapes that do not fit."""
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


def _varying(arrays, vocab_axis):
    """The arrays as shard_map's types want them: x and w differ over `vocab_axis`, the others not,
    and over the other axes all of them alike."""
    if vocab_axis is None:
        return varying_alike(*arrays)
    try:
        jax.lax.axis_size(vocab_axis)
    except NameError:
        raise ValueError(
            f"vocab_axis={vocab_axis!r} is no axis of a shard_map around this call; "
            "without one the vocabulary is whole, or divided by XLA."
        ) from None
    x_btd, w_dv, *others = arrays
    for name, array in zip(("targets_bt", "weights_bt"), others):
        if vocab_axis in varying_axes(array):
            raise ValueError(f"{name} differs over vocab_axis={vocab_axis!r}; it must not.")
    axes = varying_axes(*arrays)
    # Here and not inside, so that the gradient of x is summed over the axis once, not by chunk.
    x_btd, w_dv = (varying_over(a, axes | {vocab_axis}) for a in (x_btd, w_dv))
    return x_btd, w_dv, *(varying_over(a, axes - {vocab_axis}) for a in others)


def _in_chunks(function, chunk, x_btd, w_dv, *others):
    """function(..., chunk=) with that of the platform the program is lowered for, if it is None."""
    b, t, _ = x_btd.shape
    if chunk is None:
        sizes = {
            platform: min(t, max(MIN_CHUNK[platform], logits // (b * w_dv.shape[1])))
            for platform, logits in CHUNK_LOGITS.items()
        }
        if sizes["cpu"] != sizes["default"]:
            forms = {platform: partial(function, chunk=size) for platform, size in sizes.items()}
            return jax.lax.platform_dependent(x_btd, w_dv, *others, **forms)
        chunk = sizes["cpu"]
    return function(x_btd, w_dv, *others, chunk=min(chunk, t))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(options, chunk, x_btd, w_dv, targets_bt, weights_bt):
    def by(x_btd, w_dv, targets_bt, weights_bt, chunk):
        def body(sums, inputs):
            x, targets, weights = inputs
            z, lse = _logits(x, w_dv, options)
            nll, loss = _losses(z, lse, targets, options)
            return (sums[0] + jnp.sum(weights * loss), sums[1] + jnp.sum(weights * nll)), None

        chunks = tuple(_split(a, chunk) for a in (x_btd, targets_bt, weights_bt))
        zero = _zeros((), weights_bt)
        return jax.lax.scan(body, (zero, zero), chunks)[0]

    return _in_chunks(by, chunk, x_btd, w_dv, targets_bt, weights_bt)


def _sums_forward(options, chunk, x_btd, w_dv, targets_bt, weights_bt):
    """The sums, and the gradients of loss_sum for the backward pass."""

    def by(x_btd, w_dv, targets_bt, weights_bt, chunk):
        def body(carry, inputs):
            loss_sum, nll_sum, dw_dv = carry
            x, targets, weights = inputs
            z, lse = _logits(x, w_dv, options)
            nll, loss = _losses(z, lse, targets, options)
            dz = weights[..., None] * _slope(z, lse, targets, options)
            dz = dz.astype(x.dtype)
            dx = jnp.einsum("btv,dv->btd", dz, w_dv)
            dw_dv += jnp.einsum("btd,btv->dv", x, dz, preferred_element_type=jnp.float32)
            sums = loss_sum + jnp.sum(weights * loss), nll_sum + jnp.sum(weights * nll)
            return (*sums, dw_dv), (dx, loss)

        chunks = tuple(_split(a, chunk) for a in (x_btd, targets_bt, weights_bt))
        zero = _zeros((), weights_bt)
        start = zero, zero, _zeros(w_dv.shape, w_dv)
        (loss_sum, nll_sum, dw_dv), (dx, loss) = jax.lax.scan(body, start, chunks)
        t = targets_bt.shape[1]
        kept = _join(dx, t), dw_dv.astype(w_dv.dtype), _join(loss, t)
        return (loss_sum, nll_sum), kept

    return _in_chunks(by, chunk, x_btd, w_dv, targets_bt, weights_bt)


def _sums_backward(options, chunk, kept, cotangents):
    dx_btd, dw_dv, loss_bt = kept
    g, _ = cotangents
    return (g * dx_btd).astype(dx_btd.dtype), (g * dw_dv).astype(dw_dv.dtype), None, g * loss_bt


_sums.defvjp(_sums_forward, _sums_backward)


def _zeros(shape, like):
    """In float32, varying as `like` does."""
    return varying_over(jnp.zeros(shape, jnp.float32), varying_axes(like))


def _logits(x, w_dv, options):
    """(logits, log of the softmax's denominator) of one chunk, in float32."""
    z = jnp.einsum("btd,dv->btv", x, w_dv, preferred_element_type=jnp.float32)
    if options.softcap is not None:
        z = options.softcap * jnp.tanh(z / options.softcap)
    if options.vocab_axis is None:
        return z, jax.nn.logsumexp(z, axis=-1)
    top = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(z, axis=-1)), options.vocab_axis)
    total = jax.lax.psum(jnp.sum(jnp.exp(z - top[..., None]), axis=-1), options.vocab_axis)
    return z, top + jnp.log(total)


def _losses(z, lse, targets, options):
    """(nll, loss) of each token."""
    picked = _pick(z, targets, options)
    loss = lse - picked + options.z_loss * lse**2
    if options.label_smoothing:
        mean = jnp.sum(z, axis=-1) / _vocabulary(z, options)
        if options.vocab_axis is not None:
            mean = jax.lax.psum(mean, options.vocab_axis)
        loss += options.label_smoothing * (picked - mean)
    return lse - picked, loss


def _slope(z, lse, targets, options):
    """The gradient of each token's loss by the logits before their soft cap."""
    hot = (targets - _first(z, options))[..., None] == jnp.arange(z.shape[-1])
    p = jnp.exp(z - lse[..., None])
    smoothing = options.label_smoothing
    dz = p * (1 + 2 * options.z_loss * lse[..., None]) - (1 - smoothing) * hot
    if smoothing:
        dz -= smoothing / _vocabulary(z, options)
    return dz if options.softcap is None else dz * (1 - (z / options.softcap) ** 2)


def _pick(z, targets, options):
    """The logit of the target, on whatever device it lies."""
    if options.vocab_axis is None:
        return jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
    index = targets - _first(z, options)
    here = (index >= 0) & (index < z.shape[-1])
    picked = jnp.take_along_axis(z, jnp.where(here, index, 0)[..., None], axis=-1)[..., 0]
    return jax.lax.psum(jnp.where(here, picked, 0), options.vocab_axis)


def _first(z, options):
    """The word of this device's first logit."""
    return 0 if options.vocab_axis is None else jax.lax.axis_index(options.vocab_axis) * z.shape[-1]


def _vocabulary(z, options):
    """V."""
    axis = options.vocab_axis
    return z.shape[-1] if axis is None else z.shape[-1] * jax.lax.axis_size(axis)


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
