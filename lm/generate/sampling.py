"""The next token of each row, drawn from its logits [B, V].

The filters are applied in the order of common practice: repetition penalty (Keskar et al.,
arXiv:1909.05858), temperature, top-k (Fan et al., arXiv:1805.04833), top-p (Holtzman et al.,
arXiv:1904.09751) of what top-k left, then min-p (Nguyen et al., arXiv:2407.01082). Tokens that tie
with the last one kept are kept too, so that nothing depends on the order of a sort.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError, check_positive

# Which filters are on, by name, is part of the compiled program; their values are its arguments.
Filters = Mapping[str, jax.Array | np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token.

    `temperature` 0 takes the most probable one, whatever the other filters. `top_k` keeps the k
    most probable tokens, `top_p` the fewest whose probabilities sum to at least p, `min_p` those
    with at least that share of the largest probability. A `repetition_penalty` above 1 makes tokens
    of the prompt and of the text so far less probable. None, or a penalty of 1, switches it off.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise UserError(
                f"sampling.temperature={self.temperature!r} must be 0 (the most probable token) "
                "or a number above it."
            )
        if self.top_k is not None and (self.top_k != int(self.top_k) or self.top_k < 1):
            raise UserError(
                f"sampling.top_k={self.top_k!r} must be a whole number from 1; or None."
            )
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(
                    f"sampling.{name}={value!r} must be above 0 and at most 1; or None."
                )
        check_positive(**{"sampling.repetition_penalty": self.repetition_penalty})

    def filters(self) -> dict[str, np.ndarray]:
        """The filters that are on, for `sample`. Without 'temperature' the choice is greedy."""
        on: dict[str, np.ndarray] = {}
        if self.repetition_penalty != 1:
            on["repetition_penalty"] = np.float32(self.repetition_penalty)
        if self.temperature == 0:
            return on  # the most probable token passes every other filter
        on["temperature"] = np.float32(self.temperature)
        if self.top_k is not None:
            on["top_k"] = np.int32(self.top_k)
        if self.top_p is not None and self.top_p < 1:  # a sum of 1 is all of them, but for rounding
            on["top_p"] = np.float32(self.top_p)
        if self.min_p is not None:
            on["min_p"] = np.float32(self.min_p)
        return on


def sample(
    logits_bv: jax.Array, filters: Filters, keys_b: jax.Array, seen_bv: jax.Array | None = None
) -> jax.Array:
    """One token per row, int32 [B]; row b depends on logits_bv[b], keys_b[b] and seen_bv[b] alone.

    Args:
        logits_bv: the model's logits.
        filters: `Sampling.filters()`.
        keys_b: one random key per row; not looked at when greedy.
        seen_bv: bool, the tokens already in each row; needed by the repetition penalty only.
    """
    logits_bv = filtered(logits_bv, filters, seen_bv)
    if "temperature" not in filters:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_b, logits_bv).astype(jnp.int32)


def filtered(logits_bv: jax.Array, filters: Filters, seen_bv: jax.Array | None = None) -> jax.Array:
    """The float32 logits that `sample` draws from, -inf where a filter has removed the token."""
    logits_bv = logits_bv.astype(jnp.float32)
    if "repetition_penalty" in filters:
        logits_bv = jnp.where(
            seen_bv, _penalised(logits_bv, filters["repetition_penalty"]), logits_bv
        )
    if "temperature" in filters:
        logits_bv = logits_bv / filters["temperature"]
    if "top_k" in filters or "top_p" in filters:
        logits_bv = _at_least(logits_bv, _smallest_kept(logits_bv, filters))
    if "min_p" in filters:
        largest_b1 = logits_bv.max(axis=-1, keepdims=True)
        logits_bv = _at_least(logits_bv, largest_b1 + jnp.log(filters["min_p"]))
    return logits_bv


def _penalised(logits_bv: jax.Array, penalty: jax.Array) -> jax.Array:
    return jnp.where(logits_bv > 0, logits_bv / penalty, logits_bv * penalty)


def _smallest_kept(logits_bv: jax.Array, filters: Filters) -> jax.Array:
    """The smallest logit that top-k and then top-p keep, [B, 1]."""
    # k is an argument of the program, hence a full sort where a constant k would allow lax.top_k.
    sorted_bv = jnp.sort(logits_bv, axis=-1, descending=True)
    if "top_k" in filters:
        last = jnp.minimum(filters["top_k"], logits_bv.shape[-1]) - 1
        sorted_bv = _at_least(sorted_bv, jnp.take(sorted_bv, last, axis=-1)[:, None])
    if "top_p" in filters:
        probabilities_bv = jax.nn.softmax(sorted_bv, axis=-1)
        before_bv = jnp.cumsum(probabilities_bv, axis=-1) - probabilities_bv
        sorted_bv = jnp.where(before_bv < filters["top_p"], sorted_bv, -jnp.inf)
    return jnp.min(sorted_bv, axis=-1, keepdims=True, where=sorted_bv > -jnp.inf, initial=jnp.inf)


def _at_least(logits_bv: jax.Array, smallest_b1: jax.Array) -> jax.Array:
    return jnp.where(logits_bv >= smallest_b1, logits_bv, -jnp.inf)
