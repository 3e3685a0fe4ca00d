"""Cross-entropy chunked over positions and vocabulary; full logits are never materialized.

With the vocabulary in one chunk, logits are computed once per chunk of positions. The loss ends the
forward pass, so the same loop also computes its gradients, which have the size of hidden states and
unembedding; the backward pass only scales them (Liger, arXiv:2410.10989). With the vocabulary
chunked too, the unembedding gradient is never materialized in float32 either. Logits are then
computed twice, since each token's softmax must be complete before its gradients; that costs about
as much as reading and writing the unembedding gradient for each chunk of positions.

Plain JAX on every platform. A kernel that keeps the logits on the chip would compute them twice as
well.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.varying import varying_alike, varying_axes, varying_over

# On CPU: numbers of logits per chunk, to stay in cache; fewest positions, for an efficient matmul.
CPU_LOGITS, CPU_POSITIONS = 2**21, 32
# On accelerators: most float32 numbers of the logits of a chunk and of its unembedding gradient;
# fewest vocabulary entries and positions, below which a matmul is bound by memory.
NUMBERS, VOCAB, POSITIONS = 2**27, 8192, 128
LANES = 128  # vocabulary chunks are multiples of the TPU's vector width


class Options(NamedTuple):
    """Static options; see `cross_entropy`."""

    softcap: float | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    vocab_axis: str | None = None
    embed_axes: tuple[str, ...] = ()


class Chunk(NamedTuple):
    """Positions and vocabulary entries processed at a time."""

    positions: int
    vocab: int


class Statistics(NamedTuple):
    """Statistics of each token's logits over a part of the vocabulary, [...] in float32.

    top     largest logit
    total   sum of exp(logit - top)
    picked  logit of the target, 0 if the target is in another part
    all     sum of the logits
    """

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
    """Weighted sums over all tokens of the loss and of the negative log-likelihood (nll).

    loss = nll + z_loss * lse ** 2, where lse is the log-sum-exp of the logits (PaLM,
    arXiv:2204.02311). With label_smoothing = e, nll is replaced by (1 - e) * nll + e * the mean of
    -log p over the vocabulary (Szegedy et al., arXiv:1512.00567).

    Args:
      x_btd: hidden states, any float dtype.
      w_dv: unembedding matrix.
      targets_bt: integer targets in 0..V-1, also where the weight is zero.
      weights_bt: weight of each token; 0 excludes it.
      softcap: logits become softcap * tanh(logits / softcap).
      z_loss: coefficient of the auxiliary z-loss.
      label_smoothing: e, from 0 to 1.
      vocab_axis: inside `jax.shard_map` (with check_vma on), the mesh axis that shards the
        vocabulary: w_dv is this device's shard; targets index the full vocabulary. Devices exchange
        statistics of tokens and the gradient of x, but no logits.
      embed_axes: inside `jax.shard_map`, the mesh axes that shard the rows of w_dv while each
        device has its own tokens (FSDP). w_dv is all-gathered and its gradient reduce-scattered in
        the forward pass, one chunk of the vocabulary at a time.
      chunk, vocab_chunk: positions and vocabulary entries processed at a time. If only one is set,
        the other is not chunked; if both are None, sizes are chosen for the platform.

    Returns:
      (loss_sum, nll_sum) in float32. loss_sum is differentiable with respect to x, w and the
      weights; nll_sum has no gradient.

    Raises:
      ValueError: an argument does not fit the others.
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
    embed_axes: tuple[str, ...] = (),
    chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> jax.Array:
    """Returns nll_bt of each token in float32. Arguments as in `cross_entropy`.

    It is differentiable with respect to x and w. The backward pass computes the logits again, since
    it cannot know the weight of each token earlier; where that is known, `cross_entropy` is faster.
    """
    _check(x_btd, w_dv, targets_bt, softcap, chunk, vocab_chunk, embed_axes)
    options = Options(softcap=softcap, vocab_axis=vocab_axis, embed_axes=tuple(embed_axes))
    arrays = _varying((x_btd, w_dv, targets_bt), vocab_axis)
    return _token_losses(options, (chunk, vocab_chunk), *arrays)


def _check(x_btd, w_dv, targets_bt, softcap, chunk, vocab_chunk, embed_axes=()) -> None:
    """Raises ValueError for the first argument that does not fit."""
    ways = _ways(embed_axes, "embed_axes")
    if x_btd.ndim != 3 or w_dv.ndim != 2 or x_btd.shape[-1] != w_dv.shape[0] * ways:
        raise ValueError(f"x_btd {x_btd.shape} and w_dv {w_dv.shape} must share the width D.")
    if targets_bt.shape != x_btd.shape[:2]:
        raise ValueError(f"targets_bt {targets_bt.shape} must match x_btd {x_btd.shape}.")
    if not jnp.issubdtype(targets_bt.dtype, jnp.integer):
        raise ValueError(f"targets_bt is {targets_bt.dtype}; it needs integers.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive; None disables it.")
    for name, size in {"chunk": chunk, "vocab_chunk": vocab_chunk}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} must be at least 1; None selects a size.")


def _ways(axes, argument) -> int:
    """Number of devices along these mesh axes of the surrounding shard_map."""
    try:
        return jax.lax.axis_size(axes)
    except NameError:
        raise ValueError(
            f"{argument}={axes!r} is not an axis of a surrounding shard_map; omit it outside of "
            "shard_map, where XLA shards w_dv."
        ) from None


def _varying(arrays, vocab_axis):
    """The arrays with the varying axes that shard_map requires: x and w vary over `vocab_axis`, the
    others do not, and all vary alike over the other axes."""
    if vocab_axis is None:
        return varying_alike(*arrays)
    _ways(vocab_axis, "vocab_axis")
    x_btd, w_dv, *others = arrays
    for name, array in zip(("targets_bt", "weights_bt"), others):
        if vocab_axis in varying_axes(array):
            raise ValueError(f"{name} varies over vocab_axis={vocab_axis!r}; replicate it.")
    axes = varying_axes(*arrays)
    # Cast outside of the loops, so that the gradient of x is summed over the axis once, not per
    # chunk.
    x_btd, w_dv = (varying_over(a, axes | {vocab_axis}) for a in (x_btd, w_dv))
    return x_btd, w_dv, *(varying_over(a, axes - {vocab_axis}) for a in others)


def _in_chunks(function, chunks, x_btd, w_dv, *others):
    """Calls function(..., chunk=) with the requested sizes, or with those of the platform that the
    program is lowered for."""
    b, t, d = x_btd.shape
    v = w_dv.shape[1]
    positions, vocab = chunks
    if positions is None and vocab is None:
        sizes = {"cpu": _on_cpu(b, t, v), "default": _elsewhere(b, t, d, v)}
        if sizes["cpu"] != sizes["default"]:
            forms = {platform: partial(function, chunk=size) for platform, size in sizes.items()}
            return jax.lax.platform_dependent(x_btd, w_dv, *others, **forms)
        positions, vocab = sizes["cpu"]
    return function(x_btd, w_dv, *others, chunk=Chunk(min(positions or t, t), min(vocab or v, v)))


def _on_cpu(b, t, v) -> Chunk:
    """Chunk whose logits stay in cache and are computed once."""
    return Chunk(min(t, max(CPU_POSITIONS, CPU_LOGITS // (b * v))), v)


def _elsewhere(b, t, d, v) -> Chunk:
    """Chunk with the full vocabulary if that is small enough; as many positions as possible."""
    vocab = max(VOCAB, NUMBERS // max(b * t, d))
    vocab = v if vocab >= v else _evenly(v, vocab)
    return Chunk(min(t, max(POSITIONS, NUMBERS // (b * vocab))), vocab)


def _evenly(v, vocab) -> int:
    """Size of equal vocabulary chunks of about `vocab` at most."""
    each = -(-v // -(-v // vocab))
    return -(-each // LANES) * LANES


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(options, chunks, x_btd, w_dv, targets_bt, weights_bt):
    def by(x_btd, w_dv, targets_bt, weights_bt, chunk):
        x, targets, weights = (_split(a, chunk.positions) for a in (x_btd, targets_bt, weights_bt))
        nll, loss = _losses(_statistics(x, targets, w_dv, options, chunk), w_dv, options)
        return jnp.sum(weights * loss), jnp.sum(weights * nll)

    return _in_chunks(by, chunks, x_btd, w_dv, targets_bt, weights_bt)


def _sums_and_gradients(options, chunks, arrays, has_dw):
    """Returns the sums, and as residuals the gradients of loss_sum; without `has_dw` that of w is
    None."""

    def by(x_btd, w_dv, targets_bt, weights_bt, chunk):
        whole = chunk.vocab == w_dv.shape[1]
        gradients = _gradients_at_once if whole else _gradients_by_vocab_chunk
        chunks = (_split(a, chunk.positions) for a in (x_btd, targets_bt, weights_bt))
        sums, dx, dw_dv, loss = gradients(*chunks, w_dv, options, chunk, has_dw)
        # The backward pass starts only after the gradient of w is reduce-scattered.
        dx, dw_dv = jax.lax.optimization_barrier((dx, dw_dv))
        t = targets_bt.shape[1]
        types = jnp.empty(0, x_btd.dtype), jnp.empty(0, w_dv.dtype)
        return sums, (_join(dx, t), dw_dv, _join(loss, t), types)

    return _in_chunks(by, chunks, *arrays)


def _sums_forward(options, chunks, *primals):
    # A frozen output matrix, as under LoRA, needs no gradient.
    has_dw = primals[1].perturbed
    return _sums_and_gradients(options, chunks, [p.value for p in primals], has_dw)


def _sums_backward(options, chunks, residuals, cotangents):
    dx_btd, dw_dv, loss_bt, (x_type, w_type) = residuals
    g, _ = cotangents
    dx_btd = (g * dx_btd).astype(x_type.dtype)
    dw_dv = None if dw_dv is None else (g * dw_dv).astype(w_type.dtype)
    return dx_btd, dw_dv, None, g * loss_bt


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_losses(options, chunks, x_btd, w_dv, targets_bt):
    def by(x_btd, w_dv, targets_bt, chunk):
        x, targets = (_split(a, chunk.positions) for a in (x_btd, targets_bt))
        statistics = _statistics(x, targets, w_dv, options, chunk)
        return _join(_lse(statistics) - statistics.picked, targets_bt.shape[1])

    return _in_chunks(by, chunks, x_btd, w_dv, targets_bt)


def _token_losses_forward(options, chunks, *primals):
    arrays = [p.value for p in primals]
    # None or (): whether w has a gradient, in the structure of the residuals.
    return _token_losses(options, chunks, *arrays), (arrays, () if primals[1].perturbed else None)


def _token_losses_backward(options, chunks, residuals, g_bt):
    """The gradients of the sum of the losses, each weighted by its cotangent."""
    arrays, mark = residuals
    x_btd, w_dv, _ = arrays
    has_dw = mark is not None
    _, (dx_btd, dw_dv, *_) = _sums_and_gradients(options, chunks, (*arrays, g_bt), has_dw)
    return dx_btd.astype(x_btd.dtype), dw_dv.astype(w_dv.dtype) if has_dw else None, None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward, symbolic_zeros=True)


def _gradients_at_once(x, targets, weights, w_dv, options, chunk, has_dw):
    """Returns ((loss_sum, nll_sum), dx, dw_dv, loss) from logits of the full vocabulary, for
    positions in chunks [chunks, B, chunk, ...]."""
    full_dv = _gathered(w_dv, options)

    def body(carry, inputs):
        loss_sum, nll_sum, dw_dv = carry
        x, targets, weights = inputs
        z = _logits(x, full_dv, options)
        vocab_range = _vocab_range(w_dv, options)
        statistics = _over_axis(_chunk_statistics(z, targets, vocab_range), options)
        nll, loss = _losses(statistics, w_dv, options)
        dz = weights[..., None] * _slope(z, _lse(statistics), targets, vocab_range, w_dv, options)
        dz = dz.astype(x.dtype)
        dx = jnp.einsum("btv,dv->btd", dz, full_dv)
        if has_dw:
            dw_dv += jnp.einsum("btd,btv->dv", x, dz, preferred_element_type=jnp.float32)
        sums = loss_sum + jnp.sum(weights * loss), nll_sum + jnp.sum(weights * nll)
        return (*sums, dw_dv), (dx, loss)

    zero = _zeros((), weights)
    start = zero, zero, _zeros(full_dv.shape, w_dv) if has_dw else None
    (*sums, dw_dv), (dx, loss) = jax.lax.scan(body, start, (x, targets, weights))
    return tuple(sums), dx, _scattered(dw_dv, w_dv, options) if has_dw else None, loss


def _gradients_by_vocab_chunk(x, targets, weights, w_dv, options, chunk, has_dw):
    """As `_gradients_at_once`, with the vocabulary in chunks."""
    statistics = _statistics(x, targets, w_dv, options, chunk)
    nll, loss = _losses(statistics, w_dv, options)
    per_chunk = jnp.arange(len(x)), x, targets, weights, _lse(statistics)

    def over_vocab(dx, part):
        number, w = part
        w = _gathered(w, options)
        vocab_range = _vocab_range(w_dv, options, number, chunk)

        def over_positions(carry, inputs):
            dx, dw = carry
            i, x, targets, weights, lse = inputs
            z = _logits(x, w, options)
            dz = weights[..., None] * _slope(z, lse, targets, vocab_range, w_dv, options)
            dz = dz.astype(x.dtype)
            new = jnp.einsum("btv,dv->btd", dz, w, preferred_element_type=jnp.float32)
            if has_dw:
                dw += jnp.einsum("btd,btv->dv", x, dz, preferred_element_type=jnp.float32)
            return (dx.at[i].add(new), dw), None

        start = dx, _zeros(w.shape, w_dv) if has_dw else None
        (dx, dw), _ = jax.lax.scan(over_positions, start, per_chunk)
        return dx, _scattered(dw, w_dv, options) if has_dw else None

    parts = _split_vocab(w_dv, chunk)
    dx, dw = jax.lax.scan(over_vocab, _zeros(x.shape, x), (jnp.arange(len(parts)), parts))
    sums = jnp.sum(weights * loss), jnp.sum(weights * nll)
    dx = dx.astype(x.dtype)
    return sums, dx, _join_vocab(dw, w_dv.shape[1]) if has_dw else None, loss


def _statistics(x, targets, w_dv, options, chunk) -> Statistics:
    """Statistics over the full vocabulary of tokens in chunks [chunks, B, chunk]."""

    def over_vocab(before, part):
        number, w = part
        w = _gathered(w, options)
        vocab_range = _vocab_range(w_dv, options, number, chunk)

        def over_positions(_, inputs):
            before, x, targets = inputs
            return None, _merge(
                before, _chunk_statistics(_logits(x, w, options), targets, vocab_range)
            )

        return jax.lax.scan(over_positions, None, (before, x, targets))[1], None

    zero = _zeros(targets.shape, x)
    parts = _split_vocab(w_dv, chunk)
    start = Statistics(zero - jnp.inf, zero, zero, zero)
    statistics, _ = jax.lax.scan(over_vocab, start, (jnp.arange(len(parts)), parts))
    return _over_axis(statistics, options)


def _zeros(shape, like):
    """Float32 zeros that vary over the same mesh axes as `like`."""
    return varying_over(jnp.zeros(shape, jnp.float32), varying_axes(like))


def _logits(x, w_dv, options):
    """Logits of one chunk, in float32."""
    z = jnp.einsum("btd,dv->btv", x, w_dv, preferred_element_type=jnp.float32)
    return z if options.softcap is None else options.softcap * jnp.tanh(z / options.softcap)


def _vocab_range(w_dv, options, number=0, chunk=None):
    """(first, count) of the vocabulary entries of a chunk; logits beyond `count` are padding."""
    local_vocab = w_dv.shape[1]
    first = 0
    if options.vocab_axis is not None:
        first = jax.lax.axis_index(options.vocab_axis) * local_vocab
    if chunk is None or chunk.vocab == local_vocab:
        return first, local_vocab
    begin = number * chunk.vocab
    return first + begin, jnp.minimum(local_vocab - begin, chunk.vocab)


def _chunk_statistics(z, targets, vocab_range) -> Statistics:
    first, count = vocab_range
    seen = z if count is z.shape[-1] else jnp.where(jnp.arange(z.shape[-1]) < count, z, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(seen, axis=-1))
    index = targets - first
    in_chunk = (index >= 0) & (index < count)
    picked = jnp.take_along_axis(z, jnp.where(in_chunk, index, 0)[..., None], axis=-1)[..., 0]
    return Statistics(
        top=top,
        total=jnp.sum(jnp.exp(seen - top[..., None]), axis=-1),
        picked=jnp.where(in_chunk, picked, 0),
        all=jnp.sum(z, axis=-1),  # padding is zero
    )


def _merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics over both parts of the vocabulary."""
    top = jnp.maximum(a.top, b.top)
    total = a.total * jnp.exp(a.top - top) + b.total * jnp.exp(b.top - top)
    return Statistics(top, total, a.picked + b.picked, a.all + b.all)


def _over_axis(s: Statistics, options) -> Statistics:
    """Statistics over the vocabulary shards of all devices."""
    axis = options.vocab_axis
    if axis is None:
        return s
    top = jax.lax.pmax(s.top, axis)
    total = s.total * jnp.exp(s.top - top)
    return Statistics(top, *(jax.lax.psum(x, axis) for x in (total, s.picked, s.all)))


def _lse(s: Statistics):
    """Log-sum-exp: the log of the softmax's denominator."""
    return s.top + jnp.log(s.total)


def _losses(s: Statistics, w_dv, options):
    """(nll, loss) of each token."""
    lse = _lse(s)
    nll = lse - s.picked
    loss = nll + options.z_loss * lse**2
    if options.label_smoothing:
        loss += options.label_smoothing * (s.picked - s.all / _vocabulary(w_dv, options))
    return nll, loss


def _slope(z, lse, targets, vocab_range, w_dv, options):
    """Gradient of each token's loss with respect to the logits before the soft cap."""
    hot = (targets - vocab_range[0])[..., None] == jnp.arange(z.shape[-1])
    p = jnp.exp(z - lse[..., None])
    smoothing = options.label_smoothing
    dz = p * (1 + 2 * options.z_loss * lse[..., None]) - (1 - smoothing) * hot
    if smoothing:
        dz -= smoothing / _vocabulary(w_dv, options)
    return dz if options.softcap is None else dz * (1 - (z / options.softcap) ** 2)


def _vocabulary(w_dv, options):
    """V, the size of the full vocabulary."""
    axis = options.vocab_axis
    return w_dv.shape[1] if axis is None else w_dv.shape[1] * jax.lax.axis_size(axis)


def _gathered(w_dv, options):
    """w_dv all-gathered over `embed_axes`."""
    axes = options.embed_axes
    return jax.lax.all_gather(w_dv, axes, axis=0, tiled=True) if axes else w_dv


def _scattered(dw_dv, w_dv, options):
    """dw_dv reduce-scattered over `embed_axes`; in bfloat16 for bfloat16 weights. A sum over tokens
    would overflow float16."""
    if w_dv.dtype == jnp.bfloat16:
        dw_dv = dw_dv.astype(jnp.bfloat16)
    axes = options.embed_axes
    return jax.lax.psum_scatter(dw_dv, axes, tiled=True) if axes else dw_dv


def _split_vocab(w_dv, chunk):
    """[D, V] -> [chunks, D, chunk], zeros appended to the last chunk."""
    w_dv = jnp.pad(w_dv, ((0, 0), (0, -w_dv.shape[1] % chunk.vocab)))
    return jnp.moveaxis(w_dv.reshape(w_dv.shape[0], -1, chunk.vocab), 1, 0)


def _join_vocab(parts, v):
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
