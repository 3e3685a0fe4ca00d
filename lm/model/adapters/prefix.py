"""Prefix tuning: trained keys and values that every token attends to in every layer (Li and Liang,
arXiv:2101.00190), also known as P-tuning v2 (Liu et al., arXiv:2110.07602)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lm.errors import check_positive, check_size
from lm.model.adapters.adapter import ROOT, Adapter, Weight, moved, moved_back
from lm.model.initializers import Initializer, normal, zeros

KEY = "kv_prefix"  # of the module in an attention layer
_ENCODER = f"{ROOT}/encoder"


@dataclass(frozen=True, kw_only=True)
class Prefix(Adapter):
    """`tokens` trained keys and values per layer and key/value head, before those of the text. They
    have no position: no rotation applies to them, and windows do not hide them.

    Args:
      tokens: number of trained keys.
      hidden: trains an embedding of width `hidden` per token and a feed-forward with one hidden
        layer of that width, which computes the keys and values of all layers (the
        reparametrization of prefix tuning); None: trains keys and values directly (P-tuning v2).
      std: standard deviation of the initial keys and values, or of the embedding.
    """

    tokens: int = 16
    hidden: int | None = None
    std: float = 0.02

    def __post_init__(self) -> None:
        check_size(**{"model.adapter.tokens": self.tokens})
        check_positive(**{"model.adapter.std": self.std})
        if self.hidden is not None:
            check_size(**{"model.adapter.hidden": self.hidden})

    @property
    def is_computed(self) -> bool:
        return self.hidden is not None

    def declare(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        if self.hidden is None:
            return moved(weights, (KEY,))
        h, of_token = self.hidden, sum(self._numbers(shape) for shape in _shapes(weights).values())
        arrays = {
            "table": ((self.tokens, h), normal(self.std)),
            "up": ((h, h), normal(h**-0.5)),
            "up_bias": ((h,), zeros),
            "down": ((h, of_token), normal(h**-0.5)),
            "down_bias": ((of_token,), zeros),
        }
        kept = {path: weight for path, weight in weights.items() if KEY not in path.split("/")}
        return kept | {f"{_ENCODER}/{name}": _whole(*given) for name, given in arrays.items()}

    def bind(self, weights: dict[str, Any], modules: Mapping[str, Weight]) -> dict[str, Any]:
        if self.hidden is None:
            return moved_back(weights)
        names = ("table", "up", "up_bias", "down", "down_bias")
        table, up, up_bias, down, down_bias = (weights[f"{_ENCODER}/{name}"] for name in names)
        numbers_mx = jnp.tanh(table @ up + up_bias) @ down + down_bias
        bound = {path: x for path, x in weights.items() if not path.startswith(f"{ROOT}/")}
        start = 0
        for path, shape in _shapes(modules).items():
            part = numbers_mx[:, start : start + self._numbers(shape)]
            *stack, tokens, heads, width = shape
            by_token = part.reshape(tokens, *stack, heads, width)
            bound[path] = jnp.moveaxis(by_token, 0, len(stack))
            start += part.shape[1]
        return bound

    def continues(self, other: Adapter | None) -> bool:
        return isinstance(other, Prefix) and replace(self, std=other.std) == other

    def _numbers(self, shape: tuple[int, ...]) -> int:
        """Numbers per trained key of an array of keys or values."""
        return math.prod(shape) // self.tokens


def _shapes(weights: Mapping[str, Weight]) -> dict[str, tuple[int, ...]]:
    """Shapes of the keys and values of all layers, by path."""
    return {path: w.shape.shape for path, w in weights.items() if KEY in path.split("/")}


def _whole(shape: tuple[int, ...], init: Initializer) -> Weight:
    """A weight of the encoder, which is small beside the model: every device holds all of it."""
    return Weight(jax.ShapeDtypeStruct(shape, jnp.float32), ("norm",) * len(shape), init)
