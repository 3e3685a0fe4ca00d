"""Samples the next token of each row from its logits [B, V].

The filters are applied in the usual order: repetition penalty (Keskar et al.,
arXiv:1909.05858), temperature, top-k (Fan et al., arXiv:1805.04833), top-p (Holtzman et al.,
arXiv:1904.09751) of the rest, then min-p (Nguyen et al., arXiv:2407.01082). Tokens that tie with
the last one kept are kept too, so the result does not depend on the order of a sort.
"""

import numbers
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError

_REQUIRED = ("temperature", "repetition_penalty")
_GREEDY = 1e-20  # temperatures below it would overflow float32 logits; the limit is greedy
_LARGEST = 1e6  # beyond it, temperatures and penalties leave nothing of the model

# The set of active filters is part of the compiled program; their values are its arguments.
Filters = Mapping[str, jax.Array | np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling options.

    `temperature` 0 (or below 1e-20) is greedy: it takes the most probable token. `top_k` keeps the
    k most probable tokens, `top_p` the fewest whose probabilities sum to at least p, `min_p` those
    with at least that share of the largest probability. A `repetition_penalty` above 1 lowers the
    probability of tokens that occur in the prompt or the text so far. None, or a penalty of 1,
    turns a filter off.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not is_number and (value is not None or name in _REQUIRED):
                raise UserError(f"sampling.{name}={value!r} must be a number.")
        if not 0 <= self.temperature <= _LARGEST:
            raise UserError(
                f"sampling.temperature={self.temperature!r} must be 0 (the most probable token) "
                f"or a number above it, {_LARGEST:g} at most."
            )
        if self.top_k is not None and not (1 <= self.top_k < np.inf and self.top_k % 1 == 0):
            raise UserError(
                f"sampling.top_k={self.top_k!r} must be a whole number from 1; or None."
            )
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(
                    f"sampling.{name}={value!r} must be above 0 and at most 1; or None."
                )
        if not 1 / _LARGEST <= self.repetition_penalty <= _LARGEST:
            raise UserError(
                f"sampling.repetition_penalty={self.repetition_penalty!r} must be between "
                f"{1 / _LARGEST:g} and {_LARGEST:g}; 1 turns it off."
            )

    def filters(self) -> dict[str, np.ndarray]:
        """The active filters, for `sample`. Without 'temperature' the choice is greedy."""
        on: dict[str, np.ndarray] = {}
        if self.repetition_penalty != 1:
            on["repetition_penalty"] = np.float32(self.repetition_penalty)
        if self.temperature < _GREEDY:
            return on  # the most probable token passes every other filter
        on["temperature"] = np.float32(self.temperature)
        if self.top_k is not None:
            on["top_k"] = np.int32(min(self.top_k, 2**31 - 1))
        if self.top_p is not None and self.top_p < 1:  # 1 keeps all tokens
            on["top_p"] = np.float32(max(self.top_p, 1e-30))  # the most probable one is kept
        if self.min_p is not None:
            on["min_p"] = np.float32(self.min_p)
        return on


def sample(
    logits_bv: jax.Array, filters: Filters, keys_b: jax.Array, seen_bv: jax.Array | None = None
) -> jax.Array:
    """One token per row, int32 [B]; row b depends on logits_bv[b], keys_b[b] and seen_bv[b] alone.

    Args:
        logits_bv: the model's logits.
        filters: `Sampling.filters()`; the values may be [B, 1], one per row.
        keys_b: one random key per row; unused if greedy.
        seen_bv: bool, tokens that occur in each row; only for the repetition penalty.
    """
    logits_bv = filtered(logits_bv, filters, seen_bv)
    if "temperature" not in filters:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_b, logits_bv).astype(jnp.int32)


def filtered(logits_bv: jax.Array, filters: Filters, seen_bv: jax.Array | None = None) -> jax.Array:
    """The float32 logits that `sample` draws from; -inf for tokens that a filter removed."""
    logits_bv = logits_bv.astype(jnp.float32)
    if "repetition_penalty" in filters:
        logits_bv = jnp.where(
            seen_bv, _penalized(logits_bv, filters["repetition_penalty"]), logits_bv
        )
    if "temperature" in filters:
        logits_bv = logits_bv / filters["temperature"]
    if "top_k" in filters or "top_p" in filters:
        logits_bv = _at_least(logits_bv, _smallest_kept(logits_bv, filters))
    if "min_p" in filters:
        largest_b1 = logits_bv.max(axis=-1, keepdims=True)
        logits_bv = _at_least(logits_bv, largest_b1 + jnp.log(filters["min_p"]))
    return logits_bv


def _penalized(logits_bv: jax.Array, penalty: jax.Array) -> jax.Array:
    return jnp.where(logits_bv > 0, logits_bv / penalty, logits_bv * penalty)


def _smallest_kept(logits_bv: jax.Array, filters: Filters) -> jax.Array:
    """Smallest logit that top-k and then top-p keep, [B, 1]."""
    # k is an argument of the program, so lax.top_k, which needs a constant, cannot be used.
    sorted_bv = jnp.sort(logits_bv, axis=-1, descending=True)
    if "top_k" in filters:
        last = jnp.minimum(filters["top_k"], logits_bv.shape[-1]) - 1
        last_b1 = jnp.broadcast_to(last, (len(logits_bv), 1))
        sorted_bv = _at_least(sorted_bv, jnp.take_along_axis(sorted_bv, last_b1, axis=-1))
    if "top_p" in filters:
        probabilities_bv = jax.nn.softmax(sorted_bv, axis=-1)
        before_bv = jnp.cumsum(probabilities_bv, axis=-1) - probabilities_bv
        sorted_bv = jnp.where(before_bv < filters["top_p"], sorted_bv, -jnp.inf)
    return jnp.min(sorted_bv, axis=-1, keepdims=True, where=sorted_bv > -jnp.inf, initial=jnp.inf)


def _at_least(logits_bv: jax.Array, smallest_b1: jax.Array) -> jax.Array:
    return jnp.where(logits_bv >= smallest_b1, logits_bv, -jnp.inf)
