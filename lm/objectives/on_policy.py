"""Answers that the model in training writes itself, inside the training step.

On-policy distillation (Agarwal et al., arXiv:2306.13649) compares student and teacher on text of
the student, which is what it meets when it generates.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.data.batch import Batch
from lm.model import ForwardOptions, Model
from lm.parallel import sharding


def rewritten(apply: Model, batch: Batch, key: jax.Array, vocab: int) -> Batch:
    """The batch with the last answer of each document drawn from the model, at temperature 1.

    An answer is a run of targets with a weight. The new one follows the same prompt. It ends with
    the token that ends it in the data, or has as many tokens as there; targets after its end have
    weight 0. There is no gradient through the samples.

    Args:
      apply: the model in training.
      key: of the samples.
      vocab: the number of tokens to draw from; those from this one on are padding.
    """
    apply = apply.replace(
        params=jax.lax.stop_gradient(apply.params),
        mesh=sharding.active_mesh(),
        options=ForwardOptions(),
    )
    with apply.on_mesh(sharding.UNSPLIT_SEQUENCE):
        return _write(apply, batch, _answers(batch), key, vocab)


class _Answers(NamedTuple):
    """The last answer of each document.

    is_own_bt  whether a target belongs to it
    end_bt     the target that ends it; only where is_own_bt
    """

    is_own_bt: jax.Array
    end_bt: jax.Array


class _Carry(NamedTuple):
    """Carried from position to position."""

    target_b: jax.Array  # the target of the last position
    is_token_b: jax.Array  # whether it was drawn, and is the token of this position
    ended_b: jax.Array  # whether the answer has ended
    cache: Any


def _answers(batch: Batch) -> _Answers:
    has_weight_bt = batch.weights > 0
    continues_bt = batch.segments[:, 1:] == batch.segments[:, :-1]  # the next token, its document
    edge_b1 = jnp.zeros((len(batch.tokens), 1), bool)

    begins_bt = has_weight_bt & ~jnp.concatenate(
        [edge_b1, has_weight_bt[:, :-1] & continues_bt], axis=1
    )
    number_bt = jnp.cumsum(begins_bt, axis=1)  # of the answer in its row
    is_last_bt = ~jnp.concatenate([continues_bt, edge_b1], axis=1)
    last_bt = _next(is_last_bt, number_bt)
    is_own_bt = has_weight_bt & (number_bt == last_bt)

    ends_bt = is_own_bt & ~jnp.concatenate([is_own_bt[:, 1:] & continues_bt, edge_b1], axis=1)
    places_bt = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    end_bt = jnp.take_along_axis(batch.targets, _next(ends_bt, places_bt), axis=1, mode="clip")
    return _Answers(is_own_bt, end_bt)


def _next(marked_bt: jax.Array, x_bt: jax.Array) -> jax.Array:
    """x at the next marked place, itself included; x does not decrease along a row."""
    largest = jnp.iinfo(x_bt.dtype).max
    return jax.lax.cummin(jnp.where(marked_bt, x_bt, largest), axis=1, reverse=True)


def _write(apply: Model, batch: Batch, answers: _Answers, key: jax.Array, vocab: int) -> Batch:
    """Draws one token after another, with a KV cache. Positions begin at 0 in each document, so its
    keys overwrite those of the document before it in the row."""

    def step(carry: _Carry, xs: tuple) -> tuple[_Carry, tuple]:
        t, own, is_own_b, end_b, next_b = xs
        tokens_b = jnp.where(carry.is_token_b, carry.target_b, own.tokens)
        output = apply(
            tokens_b[:, None],
            positions_bt=own.positions[:, None],
            mask_bt=own.segments[:, None] > 0,
            cache=carry.cache,
        )
        logits_bv = apply.logits(output.hidden_btd)[:, 0, :vocab]
        drawn_b = jax.random.categorical(jax.random.fold_in(key, t), logits_bv)
        targets_b = jnp.where(is_own_b, drawn_b, own.targets).astype(jnp.int32)
        weights_b = jnp.where(is_own_b & carry.ended_b, 0, own.weights)
        ended_b = is_own_b & (carry.ended_b | (drawn_b == end_b))
        is_token_b = is_own_b & (next_b == own.segments)
        carry = _Carry(targets_b, is_token_b, ended_b, output.cache)
        return carry, (tokens_b, targets_b, weights_b)

    rows, length = batch.tokens.shape
    none_b = jnp.zeros(rows, bool)
    start = _Carry(batch.targets[:, 0], none_b, none_b, apply.init_cache(rows, length))
    next_bt = jnp.roll(batch.segments, -1, axis=1)
    along = jax.tree.map(jnp.transpose, (batch, *answers, next_bt))
    _, written = jax.lax.scan(step, start, (jnp.arange(length), *along))
    tokens_bt, targets_bt, weights_bt = map(jnp.transpose, written)
    return batch._replace(tokens=tokens_bt, targets=targets_bt, weights=weights_bt)
