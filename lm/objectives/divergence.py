"""Divergence of a student's distribution over the vocabulary from a teacher's, for each token, from
hidden states.

Logits are computed for a chunk of positions at a time, and [B, T, V] is never whole. The loss ends
the forward pass, so the same loop also computes its gradients, and the backward pass only scales
them (Liger, arXiv:2410.10989): no logits are computed twice.
"""

import abc
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.varying import varying_axes, varying_over
from lm.errors import UserError, check_positive

# Most logits of a model in a chunk, 64 MiB; fewest positions, for an efficient matmul.
LOGITS, POSITIONS = 2**24, 32


@dataclass(frozen=True)
class Divergence(abc.ABC):
    """Base class of sum over v of f(p_v, q_v), for a teacher p and a student q."""

    @abc.abstractmethod
    def term(self, p: jax.Array, q: jax.Array) -> jax.Array:
        """f of each entry, given log p and log q."""


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(teacher || student) = sum of p log(p / q): the student covers what the teacher does."""

    def term(self, p: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.exp(p) * (p - q)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student || teacher) = sum of q log(q / p): the student keeps to what the teacher does."""

    def term(self, p: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.exp(q) * (q - p)


@dataclass(frozen=True, kw_only=True)
class JSD(Divergence):
    """Generalized Jensen-Shannon divergence (Agarwal et al., arXiv:2306.13649), with m = beta * p +
    (1 - beta) * q:

        beta * KL(p || m) + (1 - beta) * KL(q || m)

    It vanishes as beta approaches 0 or 1; there TRL computes ForwardKL or ReverseKL instead.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        check_positive(**{"objective.divergence.beta": self.beta})
        if self.beta >= 1:
            raise UserError(
                f"objective.divergence.beta={self.beta!r} must be below 1; for TRL's beta=1 use "
                "ReverseKL(), for its beta=0 ForwardKL()."
            )

    def term(self, p: jax.Array, q: jax.Array) -> jax.Array:
        beta = jnp.float32(self.beta)
        m = jnp.logaddexp(p + jnp.log(beta), q + jnp.log1p(-beta))
        return beta * jnp.exp(p) * (p - m) + (1 - beta) * jnp.exp(q) * (q - m)


class Options(NamedTuple):
    """Static options of `divergence_sums`.

    divergence     per token
    temperature    logits of both models are divided by it, in the divergence
    cross_entropy  the loss is divergence + cross_entropy * nll
    top_k          compare the teacher's K most probable tokens, and all others as one; K < V
    softcaps       of the student's and the teacher's logits
    chunk          positions at a time; None: as many as fit in LOGITS
    vocab_axis     inside shard_map, the mesh axis that shards the vocabulary
    width_axes     inside shard_map, the mesh axes that shard the width of the student's and of the
                   teacher's output matrix
    """

    divergence: Divergence
    temperature: float = 1.0
    cross_entropy: float = 0.0
    top_k: int | None = None
    softcaps: tuple[float | None, float | None] = (None, None)
    chunk: int | None = None
    vocab_axis: str | None = None
    width_axes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


class TopK(NamedTuple):
    """The K most probable tokens of a teacher for each position; K is the last axis.

    logp_btk  their log-probabilities, float32, the largest first
    ids_btk   int32
    rest_bt   logarithm of the probability of all others together
    """

    logp_btk: jax.Array
    ids_btk: jax.Array
    rest_bt: jax.Array


Hidden = tuple[jax.Array, jax.Array]  # (x_btd, w_dv), hidden states and an output matrix


class Sums(NamedTuple):
    """loss is a scalar, the sum over tokens times their weights; divergence and nll are [B, T],
    without weights, and have no gradient."""

    loss: jax.Array
    divergence_bt: jax.Array
    nll_bt: jax.Array


def divergence_sums(
    options: Options,
    student: Hidden,
    teacher: Hidden | TopK,
    targets_bt: jax.Array,
    weights_bt: jax.Array,
) -> Sums:
    """The loss of a batch, from (x_btd, w_dv) of both models, whose widths may differ, or from a
    teacher's TopK. It is differentiable with respect to the student's."""
    b, t, v = *targets_bt.shape, student[1].shape[1]
    options = options._replace(chunk=_chunk(options, b, t, v))
    weights_bt = weights_bt.astype(jnp.float32)
    over_tokens = varying_axes(targets_bt, weights_bt)
    over_vocab = over_tokens | ({options.vocab_axis} - {None})
    # Cast outside of the loop, so that gradients are summed over mesh axes once, not per chunk.
    is_stored = isinstance(teacher, TopK)
    arrays = (
        jax.tree.map(partial(varying_over, axes=axes), tree)
        for axes, tree in (
            (over_vocab, student),
            (over_tokens if is_stored else over_vocab, teacher),
            (over_tokens, (targets_bt, weights_bt)),
        )
    )
    student, teacher, (targets_bt, weights_bt) = arrays
    sums = _sums(options, student, teacher, targets_bt, weights_bt)
    return Sums(sums.loss, *jax.lax.stop_gradient(sums[1:]))


def top_k(
    options: Options, x_btd: jax.Array, w_dv: jax.Array, *, vocab_axis=None, embed_axes=()
) -> TopK:
    """The TopK of a teacher with these hidden states and this output matrix, which `options`, the
    same as in `divergence_sums`, compare with a student."""
    options = options._replace(vocab_axis=vocab_axis, width_axes=(embed_axes, embed_axes))
    b, t, _ = x_btd.shape
    (w_dv,) = _gathered(options, w_dv)
    chunks = _split(_chunk(options, b, t, w_dv.shape[1]), x_btd)

    def body(_, x):
        p_btv = _teacher_logp(options, *x, w_dv)
        return None, _top_k(options, p_btv)

    _, chunks = jax.lax.scan(body, None, chunks)
    return TopK(*(_join(a, t) for a in chunks))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(options, student, teacher, targets_bt, weights_bt):
    x_btd, w_dv = student
    teacher_bt, matrix = _of_positions(teacher)
    w_dv, *matrix = _gathered(options, w_dv, *matrix)

    def body(loss_sum, inputs):
        x, *rest = inputs
        z = _logits(x, w_dv)
        loss, values = _loss(z, options, matrix, *rest)
        return loss_sum + loss, values

    chunks = _split(options.chunk, x_btd, teacher_bt, targets_bt, weights_bt)
    loss, values = jax.lax.scan(body, _zeros((), weights_bt), chunks)
    return Sums(loss, *(_join(a, targets_bt.shape[1]) for a in values))


def _sums_forward(options, student, teacher, targets_bt, weights_bt):
    """Returns the sums, and as residuals the gradients of the loss."""
    x_btd, w_dv = student
    teacher_bt, matrix = _of_positions(teacher)
    whole_dv, *matrix = _gathered(options, w_dv, *matrix)
    differentiate = jax.value_and_grad(_loss, has_aux=True)

    def body(carry, inputs):
        loss_sum, dw_dv = carry
        x, *rest = inputs
        (loss, values), dz = differentiate(_logits(x, whole_dv), options, matrix, *rest)
        dz = dz.astype(x.dtype)
        dx = jnp.einsum("btv,dv->btd", dz, whole_dv)
        dw_dv += jnp.einsum("btd,btv->dv", x, dz, preferred_element_type=jnp.float32)
        return (loss_sum + loss, dw_dv), (*values, dx)

    chunks = _split(options.chunk, x_btd, teacher_bt, targets_bt, weights_bt)
    start = _zeros((), weights_bt), _zeros(whole_dv.shape, w_dv)
    (loss, dw_dv), values = jax.lax.scan(body, start, chunks)
    *values, dx_btd = (_join(a, targets_bt.shape[1]) for a in values)
    if w_dv.dtype == jnp.bfloat16:  # float16 would overflow
        dw_dv = dw_dv.astype(jnp.bfloat16)
    if options.width_axes[0]:
        dw_dv = jax.lax.psum_scatter(dw_dv, options.width_axes[0], tiled=True)
    return Sums(loss, *values), (dx_btd, dw_dv, jnp.empty(0, w_dv.dtype))


def _sums_backward(options, residuals, cotangents):
    dx_btd, dw_dv, like = residuals
    g = cotangents.loss
    student = (g * dx_btd).astype(dx_btd.dtype), (g * dw_dv).astype(like.dtype)
    return student, None, None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _of_positions(teacher: Hidden | TopK) -> tuple[Any, list[jax.Array]]:
    """(arrays [B, T, ...], output matrix if it has one) of a teacher."""
    return (teacher, []) if isinstance(teacher, TopK) else (teacher[0], [teacher[1]])


def _gathered(options: Options, *matrices: jax.Array) -> list[jax.Array]:
    """The output matrices, each with its full width."""
    return [
        jax.lax.all_gather(m, axes, axis=0, tiled=True) if axes else m
        for m, axes in zip(matrices, options.width_axes)
    ]


def _chunk(options: Options, b: int, t: int, v: int) -> int:
    """Positions at a time."""
    return min(t, options.chunk or max(POSITIONS, LOGITS // (b * v)))


def _logits(x_btd: jax.Array, w_dv: jax.Array) -> jax.Array:
    return jnp.einsum("btd,dv->btv", x_btd, w_dv, preferred_element_type=jnp.float32)


def _capped(z_btv: jax.Array, cap: float | None) -> jax.Array:
    return z_btv if cap is None else cap * jnp.tanh(z_btv / cap)


def _teacher_logp(options: Options, y_bte: jax.Array, u_ev: jax.Array) -> jax.Array:
    teacher_btv = _capped(_logits(y_bte, u_ev), options.softcaps[1])
    return _log_softmax(teacher_btv / options.temperature, options.vocab_axis)


def _loss(z_btv, options, matrix, teacher_bt, targets_bt, weights_bt):
    """(loss, (divergence_bt, nll_bt)) of one chunk, from the student's logits."""
    axis = options.vocab_axis
    z_btv = _capped(z_btv, options.softcaps[0])
    p = _teacher_logp(options, teacher_bt, *matrix) if matrix else teacher_bt
    q_btv = _log_softmax(z_btv / options.temperature, axis)
    divergence_bt = _divergence(options, p, q_btv)

    logp_btv = q_btv if options.temperature == 1 else _log_softmax(z_btv, axis)
    first = 0 if axis is None else jax.lax.axis_index(axis) * z_btv.shape[-1]
    hot_btv = (targets_bt - first)[..., None] == jnp.arange(z_btv.shape[-1])
    nll_bt = -_sum(jnp.where(hot_btv, logp_btv, 0), axis)
    loss_bt = divergence_bt + options.cross_entropy * nll_bt
    return jnp.sum(weights_bt * loss_bt), (divergence_bt, nll_bt)


def _divergence(options: Options, p: jax.Array | TopK, q_btv: jax.Array) -> jax.Array:
    """divergence_bt, from the logarithms of the teacher's and the student's probabilities."""
    axis, term = options.vocab_axis, options.divergence.term
    if options.top_k is None:
        return _sum(term(p, q_btv), axis)
    if isinstance(p, TopK):
        p_btv, rest_bt = _spread(p, q_btv.shape[-1], axis), p.rest_bt
        top_btv = p_btv <= 0
    else:
        top_btv, p_btv = p > _bound(_largest(p, options.top_k, axis)[0]), p
        rest_bt = _rest(p, top_btv, axis)
    divergence_bt = _sum(jnp.where(top_btv, term(p_btv, q_btv), 0), axis)
    return divergence_bt + term(rest_bt, _rest(q_btv, top_btv, axis))


def _rest(logp_btv: jax.Array, top_btv: jax.Array, axis: str | None) -> jax.Array:
    """Logarithm of the probability of all tokens but the top ones."""
    rest_bt = _sum(jnp.where(top_btv, 0, jnp.exp(logp_btv)), axis)
    return jnp.log(jnp.maximum(rest_bt, jnp.finfo(jnp.float32).tiny))


def _largest(p_btv: jax.Array, top_k: int, axis: str | None) -> tuple[jax.Array, jax.Array]:
    """The K + 1 largest entries and their indices in the whole vocabulary."""
    p_btv = jax.lax.stop_gradient(p_btv)
    top_btk, ids_btk = jax.lax.top_k(p_btv, min(top_k + 1, p_btv.shape[-1]))
    if axis is None:
        return top_btk, ids_btk
    ids_btk += jax.lax.axis_index(axis) * p_btv.shape[-1]
    every_btk, ids_btk = (
        jax.lax.all_gather(x, axis, axis=2, tiled=True) for x in (top_btk, ids_btk)
    )
    top_btk, places_btk = jax.lax.top_k(every_btk, top_k + 1)
    return top_btk, jnp.take_along_axis(ids_btk, places_btk, axis=2)


def _bound(top_btk: jax.Array) -> jax.Array:
    """A bound between the K-th largest entry and the next one, [B, T, 1]. The K-th largest itself
    may be rounded differently where XLA computes it a second time."""
    return jnp.mean(top_btk[..., -2:], axis=-1, keepdims=True)


_NO_TOKEN = jnp.iinfo(jnp.int32).max


def _top_k(options: Options, p_btv: jax.Array) -> TopK:
    axis = options.vocab_axis
    top_btk, ids_btk = _largest(p_btv, options.top_k, axis)
    bound_bt1 = _bound(top_btk)
    logp_btk = top_btk[..., :-1]
    # As in `_divergence`: entries that are equal to the next one are not among the top.
    ids_btk = jnp.where(logp_btk > bound_bt1, ids_btk[..., :-1], _NO_TOKEN)
    if axis is not None:  # equal on all devices, as only pmax declares
        logp_btk, ids_btk = (jax.lax.pmax(x, axis) for x in (logp_btk, ids_btk))
    return TopK(logp_btk, ids_btk, _rest(p_btv, p_btv > bound_bt1, axis))


def _spread(top: TopK, v: int, axis: str | None) -> jax.Array:
    """Log-probabilities of the top tokens, [B, T, V]; 1 for all others."""
    first = 0 if axis is None else jax.lax.axis_index(axis) * v
    ids_btk = top.ids_btk - first
    ids_btk = jnp.where(ids_btk < 0, _NO_TOKEN, ids_btk)  # negative ones would count from the end
    b, t, _ = ids_btk.shape
    at = jnp.arange(b)[:, None, None], jnp.arange(t)[:, None], ids_btk
    return jnp.ones((b, t, v)).at[at].set(top.logp_btk, mode="drop")


def _log_softmax(z_btv: jax.Array, axis: str | None) -> jax.Array:
    if axis is None:
        return jax.nn.log_softmax(z_btv)
    top_bt1 = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(z_btv, -1, keepdims=True)), axis)
    z_btv = z_btv - top_bt1
    return z_btv - jnp.log(jax.lax.psum(jnp.sum(jnp.exp(z_btv), -1, keepdims=True), axis))


def _sum(x_btv: jax.Array, axis: str | None) -> jax.Array:
    """Over the whole vocabulary."""
    x_bt = jnp.sum(x_btv, axis=-1)
    return x_bt if axis is None else jax.lax.psum(x_bt, axis)


def _zeros(shape, like):
    """Float32 zeros that vary over the same mesh axes as `like`."""
    return varying_over(jnp.zeros(shape, jnp.float32), varying_axes(like))


def _split(chunk, *trees):
    """[B, T, ...] -> [chunks, B, chunk, ...] each, zeros appended to the last chunk."""

    def split(a):
        b, t = a.shape[:2]
        a = jnp.pad(a, [(0, 0), (0, -t % chunk)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(b, -1, chunk, *a.shape[2:]), 1, 0)

    return jax.tree.map(split, trees)


def _join(chunks, t):
    """[chunks, B, chunk, ...] -> [B, T, ...]."""
    a = jnp.moveaxis(chunks, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :t]
