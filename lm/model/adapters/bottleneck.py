"""Bottleneck adapters: a small feed-forward after each sublayer (Houlsby et al.,
arXiv:1902.00751)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from lm.errors import UserError, check_name, check_size
from lm.model.adapters.adapter import Adapter, Weight, moved, moved_back
from lm.model.ffn import ACTIVATIONS
from lm.model.initializers import normal, zeros
from lm.model.param import add_bias, einsum, param

KEYS = ("attention_bottleneck", "ffn_bottleneck")  # of the modules in a layer


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Adapter):
    """y + activation(y down) up on the output y of each sublayer. `up` starts at zero, so training
    starts from the frozen model.

    Args:
      hidden: width of the bottleneck.
      activation: "gelu", "gelu_tanh", "relu" or "silu".
      after: the sublayers that have one; ("ffn",) alone is the variant of Pfeiffer et al.
        (arXiv:2005.00052).
    """

    hidden: int = 64
    activation: str = "gelu"
    after: tuple[str, ...] = ("attention", "ffn")

    def __post_init__(self) -> None:
        check_size(**{"model.adapter.hidden": self.hidden})
        check_name("model.adapter.activation", self.activation, tuple(ACTIVATIONS))
        if not self.after:
            raise UserError("model.adapter.after=() names no sublayer; use ('attention', 'ffn').")
        for part in self.after:
            check_name("model.adapter.after", part, ("attention", "ffn"))

    def build(self, dim: int, rngs: nnx.Rngs) -> "BottleneckAdapter":
        """The module for model width `dim`."""
        return BottleneckAdapter(self, dim, rngs=rngs)

    def declare(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        return moved(weights, KEYS)

    def bind(self, weights: dict[str, Any], modules: Mapping[str, Weight]) -> dict[str, Any]:
        return moved_back(weights)


class BottleneckAdapter(nnx.Module):
    """y_btd -> y_btd + activation(y down) up. Weights: down [D, F], up [F, D], and biases."""

    def __init__(self, config: Bottleneck, dim: int, *, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[config.activation]
        self.down = param(rngs, (dim, config.hidden), ("embed", "rank"), normal(dim**-0.5))
        self.down_bias = param(rngs, (config.hidden,), ("norm",), zeros)
        self.up = param(rngs, (config.hidden, dim), ("rank", "embed"), zeros)
        self.up_bias = param(rngs, (dim,), ("norm",), zeros)

    def __call__(self, y_btd: jax.Array) -> jax.Array:
        h_btf = add_bias(einsum("btd,df->btf", y_btd, self.down), self.down_bias)
        h_btf = self.activation(h_btf)
        return y_btd + add_bias(einsum("btf,fd->btd", h_btf, self.up), self.up_bias)
