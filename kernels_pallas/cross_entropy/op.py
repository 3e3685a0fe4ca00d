"""Cross-entropy without whole logits: those of some positions and some words live at a time.

With the vocabulary whole, the logits of one chunk of positions live once: the loss is the end of
the forward pass, so its gradients are computed in the same loop from the same logits and wait, as
small as the hidden states and the unembedding, for the backward pass to scale them (Liger,
arXiv:2410.10989). With the vocabulary in chunks too, the unembedding's gradient is never whole
either; each token's softmax has to be known before the gradients, so that logits are computed
twice, which costs about what reading and writing that gradient for every chunk of positions did.

It is plain JAX on every platform. A kernel that keeps the logits on the chip would have to compute
them twice as well.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.varying import varying_alike, varying_axes, varying_over

# On CPU, the logits of a chunk stay near the caches, and there are positions enough for a product.
CPU_LOGITS, CPU_POSITIONS = 2**21, 32
# Elsewhere neither the logits of a chunk nor its part of the unembedding's gradient, both float32,
# are more numbers than this; but a product of fewer words or positions would wait for memory.
NUMBERS, WORDS, POSITIONS = 2**27, 8192, 128
LANES = 128  # a chunk of words is a multiple of a TPU's vector width


class Options(NamedTuple):
    """What is known when tracing; `cross_entropy` says what each is."""

    softcap: float | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    vocab_axis: str | None = None
    embed_axes: tuple[str, ...] = ()


class Chunk(NamedTuple):
    """How many positions and words are handled at a time."""

    positions: int
    words: int


class Statistics(NamedTuple):
    """Of tokens' logits over some of the vocabulary, [...] in float32: the largest, the sum of
    exp(logit - largest), the target's (zero where it is another word) and the sum of all."""

    top: jax.Array
    total: jax.Array
    picked: jax.Array
    all: jax.Array


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
    embed_axes: tuple[str, ...] = (),
    chunk: int | None = None,
    vocab_chunk: int | None = None,
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
      embed_axes: inside `jax.shard_map`, the mesh axes over which the rows of w_dv are divided,
        while each device has tokens of its own: w_dv is collected from them, and its gradient
        summed into the parts before the backward pass, chunk of words by chunk.
      chunk, vocab_chunk: positions and words handled at a time. One of them alone leaves the other
        whole; None for both chooses.

    Returns:
      (loss_sum, nll_sum) in float32. Gradients flow through loss_sum, to x, w and the weights;
      nll_sum is for reporting.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    _check(x_btd, w_dv, targets_bt, softcap, chunk, vocab_chunk, embed_axes)
    if weights_bt.shape != targets_bt.shape:
        raise ValueError(f"weights_bt {weights_bt.shape} must match targets_bt {targets_bt.shape}.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing} must lie between 0 and 1.")
    options = Options(softcap, z_loss, label_smoothing, vocab_axis, tuple(embed_axes))
    arrays = x_btd, w_dv, targets_bt, weights_bt.astype(jnp.float32)
    chunks = chunk, vocab_chunk
    loss_sum, nll_sum = _sums(options, chunks, *_varying(arrays, vocab_axis))
    return loss_sum, jax.lax.stop_gradient(nll_sum)


def token_losses(
    x_btd: jax.Array,
    w_dv: jax.Array,
    targets_bt: jax.Array,
    *,
    softcap: float | None = None,
    vocab_axis: str | None = None,
    chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> jax.Array:
    """nll_bt of each token in float32, for evaluation; arguments as in `cross_entropy`."""
    _check(x_btd, w_dv, targets_bt, softcap, chunk, vocab_chunk)
    options = Options(softcap=softcap, vocab_axis=vocab_axis)

    def by(x_btd, w_dv, targets_bt, chunk):
        x, targets = (_split(a, chunk.positions) for a in (x_btd, targets_bt))
        statistics = _statistics(x, targets, w_dv, options, chunk)
        return _join(_lse(statistics) - statistics.picked, targets_bt.shape[1])

    return _in_chunks(by, (chunk, vocab_chunk), *_varying((x_btd, w_dv, targets_bt), vocab_axis))


def _check(x_btd, w_dv, targets_bt, softcap, chunk, vocab_chunk, embed_axes=()) -> None:
    """Raises ValueError on what does not fit."""
    ways = _ways(embed_axes, "embed_axes")
    if x_btd.ndim != 3 or w_dv.ndim != 2 or x_btd.shape[-1] != w_dv.shape[0] * ways:
        raise ValueError(f"x_btd {x_btd.shape} and w_dv {w_dv.shape} must share the width D.")
    if targets_bt.shape != x_btd.shape[:2]:
        raise ValueError(f"targets_bt {targets_bt.shape} must match x_btd {x_btd.shape}.")
    if not jnp.issubdtype(targets_bt.dtype, jnp.integer):
        raise ValueError(f"targets_bt is {targets_bt.dtype}; it needs integers.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be above zero; None turns it off.")
    for name, size in {"chunk": chunk, "vocab_chunk": vocab_chunk}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} must be at least 1; None chooses.")


def _ways(axes, argument) -> int:
    """Devices along these axes of the shard_map around."""
    try:
        return jax.lax.axis_size(axes)
    except NameError:
        raise ValueError(
            f"{argument}={axes!r} is no axis of a shard_map around this call; "
            "without one w_dv is whole, or divided by XLA."
        ) from None


def _varying(arrays, vocab_axis):
    """The arrays as shard_map's types want them: x and w differ over `vocab_axis`, the others not,
    and over the other axes all of them alike."""
    if vocab_axis is None:
        return varying_alike(*arrays)
    _ways(vocab_axis, "vocab_axis")
    x_btd, w_dv, *others = arrays
    for name, array in zip(("targets_bt", "weights_bt"), others):
        if vocab_axis in varying_axes(array):
            raise ValueError(f"{name} differs over vocab_axis={vocab_axis!r}; it must not.")
    axes = varying_axes(*arrays)
    # Here and not inside, so that the gradient of x is summed over the axis once, not by chunk.
    x_btd, w_dv = (varying_over(a, axes | {vocab_axis}) for a in (x_btd, w_dv))
    return x_btd, w_dv, *(varying_over(a, axes - {vocab_axis}) for a in others)


def _in_chunks(function, chunks, x_btd, w_dv, *others):
    """function(..., chunk=) with the sizes asked for, or those of the platform the program is
    lowered for."""
    b, t, d = x_btd.shape
    v = w_dv.shape[1]
    positions, words = chunks
    if positions is None and words is None:
        sizes = {"cpu": _on_cpu(b, t, v), "default": _elsewhere(b, t, d, v)}
        if sizes["cpu"] != sizes["default"]:
            forms = {platform: partial(function, chunk=size) for platform, size in sizes.items()}
            return jax.lax.platform_dependent(x_btd, w_dv, *others, **forms)
        positions, words = sizes["cpu"]
    return function(x_btd, w_dv, *others, chunk=Chunk(min(positions or t, t), min(words or v, v)))


def _on_cpu(b, t, v) -> Chunk:
    """Logits near the caches, and computed once."""
    return Chunk(min(t, max(CPU_POSITIONS, CPU_LOGITS // (b * v))), v)


def _elsewhere(b, t, d, v) -> Chunk:
    """The vocabulary whole while that is small enough, and then as many positions as possible."""
    words = max(WORDS, NUMBERS // max(b * t, d))
    words = v if words >= v else _evenly(v, words)
    return Chunk(min(t, max(POSITIONS, NUMBERS // (b * words))), words)


def _evenly(v, words) -> int:
    """Chunks of at most about `words`, of which the last is as full as the others."""
    each = -(-v // -(-v // words))
    return -(-each // LANES) * LANES


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(options, chunks, x_btd, w_dv, targets_bt, weights_bt):
    def by(x_btd, w_dv, targets_bt, weights_bt, chunk):
        x, targets, weights = (_split(a, chunk.positions) for a in (x_btd, targets_bt, weights_bt))
        nll, loss = _losses(_statistics(x, targets, w_dv, options, chunk), w_dv, options)
        return jnp.sum(weights * loss), jnp.sum(weights * nll)

    return _in_chunks(by, chunks, x_btd, w_dv, targets_bt, weights_bt)


def _sums_forward(options, chunks, x_btd, w_dv, targets_bt, weights_bt):
    """The sums, and the gradients of loss_sum for the backward pass."""

    def by(x_btd, w_dv, targets_bt, weights_bt, chunk):
        whole = chunk.words == w_dv.shape[1]
        gradients = _gradients_at_once if whole else _gradients_by_words
        chunks = (_split(a, chunk.positions) for a in (x_btd, targets_bt, weights_bt))
        sums, dx, dw_dv, loss = gradients(*chunks, w_dv, options, chunk)
        # Nothing of the backward pass before the gradient of w is in its parts.
        dx, dw_dv = jax.lax.optimization_barrier((dx, dw_dv))
        t = targets_bt.shape[1]
        types = jnp.empty(0, x_btd.dtype), jnp.empty(0, w_dv.dtype)
        return sums, (_join(dx, t), dw_dv, _join(loss, t), types)

    return _in_chunks(by, chunks, x_btd, w_dv, targets_bt, weights_bt)


def _sums_backward(options, chunks, kept, cotangents):
    dx_btd, dw_dv, loss_bt, (x_type, w_type) = kept
    g, _ = cotangents
    return (g * dx_btd).astype(x_type.dtype), (g * dw_dv).astype(w_type.dtype), None, g * loss_bt


_sums.defvjp(_sums_forward, _sums_backward)


def _gradients_at_once(x, targets, weights, w_dv, options, chunk):
    """((loss_sum, nll_sum), dx, dw_dv, loss) from logits of the whole vocabulary, for positions in
    chunks [chunks, B, chunk, ...]."""
    whole_dv = _collected(w_dv, options)

    def body(carry, inputs):
        loss_sum, nll_sum, dw_dv = carry
        x, targets, weights = inputs
        z = _logits(x, whole_dv, options)
        words = _words(w_dv, options)
        statistics = _over_axis(_of_words(z, targets, words), options)
        nll, loss = _losses(statistics, w_dv, options)
        dz = weights[..., None] * _slope(z, _lse(statistics), targets, words, w_dv, options)
        dz = dz.astype(x.dtype)
        dx = jnp.einsum("btv,dv->btd", dz, whole_dv)
        dw_dv += jnp.einsum("btd,btv->dv", x, dz, preferred_element_type=jnp.float32)
        sums = loss_sum + jnp.sum(weights * loss), nll_sum + jnp.sum(weights * nll)
        return (*sums, dw_dv), (dx, loss)

    zero = _zeros((), weights)
    start = zero, zero, _zeros(whole_dv.shape, w_dv)
    (*sums, dw_dv), (dx, loss) = jax.lax.scan(body, start, (x, targets, weights))
    return tuple(sums), dx, _parted(dw_dv, w_dv, options), loss


def _gradients_by_words(x, targets, weights, w_dv, options, chunk):
    """The same, with the logits of some words at a time."""
    statistics = _statistics(x, targets, w_dv, options, chunk)
    nll, loss = _losses(statistics, w_dv, options)
    per_chunk = jnp.arange(len(x)), x, targets, weights, _lse(statistics)

    def of_words(dx, part):
        number, w = part
        w = _collected(w, options)
        words = _words(w_dv, options, number, chunk)

        def of_positions(carry, inputs):
            dx, dw = carry
            i, x, targets, weights, lse = inputs
            z = _logits(x, w, options)
            dz = weights[..., None] * _slope(z, lse, targets, words, w_dv, options)
            dz = dz.astype(x.dtype)
            new = jnp.einsum("btv,dv->btd", dz, w, preferred_element_type=jnp.float32)
            dw += jnp.einsum("btd,btv->dv", x, dz, preferred_element_type=jnp.float32)
            return (dx.at[i].add(new), dw), None

        start = dx, _zeros(w.shape, w_dv)
        (dx, dw), _ = jax.lax.scan(of_positions, start, per_chunk)
        return dx, _parted(dw, w_dv, options)

    parts = _split_words(w_dv, chunk)
    dx, dw = jax.lax.scan(of_words, _zeros(x.shape, x), (jnp.arange(len(parts)), parts))
    sums = jnp.sum(weights * loss), jnp.sum(weights * nll)
    return sums, dx.astype(x.dtype), _join_words(dw, w_dv.shape[1]), loss


def _statistics(x, targets, w_dv, options, chunk) -> Statistics:
    """Over the whole vocabulary, of tokens in chunks [chunks, B, chunk]."""

    def of_words(before, part):
        number, w = part
        w = _collected(w, options)
        words = _words(w_dv, options, number, chunk)

        def of_positions(_, inputs):
            before, x, targets = inputs
            return None, _merge(before, _of_words(_logits(x, w, options), targets, words))

        return jax.lax.scan(of_positions, None, (before, x, targets))[1], None

    zero = _zeros(targets.shape, x)
    parts = _split_words(w_dv, chunk)
    start = Statistics(zero - jnp.inf, zero, zero, zero)
    statistics, _ = jax.lax.scan(of_words, start, (jnp.arange(len(parts)), parts))
    return _over_axis(statistics, options)


def _zeros(shape, like):
    """In float32, varying as `like` does."""
    return varying_over(jnp.zeros(shape, jnp.float32), varying_axes(like))


def _logits(x, w_dv, options):
    """Of one chunk, in float32."""
    z = jnp.einsum("btd,dv->btv", x, w_dv, preferred_element_type=jnp.float32)
    return z if options.softcap is None else options.softcap * jnp.tanh(z / options.softcap)


def _words(w_dv, options, number=0, chunk=None):
    """(first, count) of the words of a chunk; columns of its logits beyond `count` are none."""
    held = w_dv.shape[1]
    first = 0 if options.vocab_axis is None else jax.lax.axis_index(options.vocab_axis) * held
    if chunk is None or chunk.words == held:
        return first, held
    begin = number * chunk.words
    return first + begin, jnp.minimum(held - begin, chunk.words)


def _of_words(z, targets, words) -> Statistics:
    first, count = words
    seen = z if count is z.shape[-1] else jnp.where(jnp.arange(z.shape[-1]) < count, z, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(seen, axis=-1))
    index = targets - first
    here = (index >= 0) & (index < count)
    picked = jnp.take_along_axis(z, jnp.where(here, index, 0)[..., None], axis=-1)[..., 0]
    return Statistics(
        top=top,
        total=jnp.sum(jnp.exp(seen - top[..., None]), axis=-1),
        picked=jnp.where(here, picked, 0),
        all=jnp.sum(z, axis=-1),  # those that are none are zero
    )


def _merge(a: Statistics, b: Statistics) -> Statistics:
    """Of the words of both."""
    top = jnp.maximum(a.top, b.top)
    total = a.total * jnp.exp(a.top - top) + b.total * jnp.exp(b.top - top)
    return Statistics(top, total, a.picked + b.picked, a.all + b.all)


def _over_axis(s: Statistics, options) -> Statistics:
    """Of the words of all devices."""
    axis = options.vocab_axis
    if axis is None:
        return s
    top = jax.lax.pmax(s.top, axis)
    total = s.total * jnp.exp(s.top - top)
    return Statistics(top, *(jax.lax.psum(x, axis) for x in (total, s.picked, s.all)))


def _lse(s: Statistics):
    """The log of the softmax's denominator."""
    return s.top + jnp.log(s.total)


def _losses(s: Statistics, w_dv, options):
    """(nll, loss) of each token."""
    lse = _lse(s)
    nll = lse - s.picked
    loss = nll + options.z_loss * lse**2
    if options.label_smoothing:
        loss += options.label_smoothing * (s.picked - s.all / _vocabulary(w_dv, options))
    return nll, loss


def _slope(z, lse, targets, words, w_dv, options):
    """The gradient of each token's loss by the logits before their soft cap."""
    hot = (targets - words[0])[..., None] == jnp.arange(z.shape[-1])
    p = jnp.exp(z - lse[..., None])
    smoothing = options.label_smoothing
    dz = p * (1 + 2 * options.z_loss * lse[..., None]) - (1 - smoothing) * hot
    if smoothing:
        dz -= smoothing / _vocabulary(w_dv, options)
    return dz if options.softcap is None else dz * (1 - (z / options.softcap) ** 2)


def _vocabulary(w_dv, options):
    """V."""
    axis = options.vocab_axis
    return w_dv.shape[1] if axis is None else w_dv.shape[1] * jax.lax.axis_size(axis)


def _collected(w_dv, options):
    """The rows of all devices."""
    axes = options.embed_axes
    return jax.lax.all_gather(w_dv, axes, axis=0, tiled=True) if axes else w_dv


def _parted(dw_dv, w_dv, options):
    """The gradient of this device's rows, summed over the devices that share them; in bfloat16
    for weights in bfloat16. A sum over tokens is too large for float16."""
    if w_dv.dtype == jnp.bfloat16:
        dw_dv = dw_dv.astype(jnp.bfloat16)
    axes = options.embed_axes
    return jax.lax.psum_scatter(dw_dv, axes, tiled=True) if axes else dw_dv


def _split_words(w_dv, chunk):
    """[D, V] -> [chunks, D, chunk], zeros appended to the last chunk."""
    w_dv = jnp.pad(w_dv, ((0, 0), (0, -w_dv.shape[1] % chunk.words)))
    return jnp.moveaxis(w_dv.reshape(w_dv.shape[0], -1, chunk.words), 1, 0)


def _join_words(parts, v):
    """[chunks, D, chunk] -> [D, V]."""
    w_dv = jnp.moveaxis(parts, 0, 1)
    return w_dv.reshape(w_dv.shape[0], -1)[:, :v]


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
