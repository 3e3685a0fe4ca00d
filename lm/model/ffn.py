"""Feed-forward layers: `GatedMLP`, `FeedForward`, and the configs that declare them.

A feed-forward module is called as `ffn(x_btd, mask_bt)`, where the mask is true on real tokens, and
returns y_btd, or `(y_btd, sums)` if it has auxiliary losses (see `MixtureOfExperts`). To add your
own, subclass `FeedForwardConfig`.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm.errors import check_name, check_size
from lm.model.initializers import DEFAULT, Init, zeros
from lm.model.param import add_bias, einsum, param
from lm.parallel.sharding import shard

Activation = Callable[[jax.Array], jax.Array]


def relu2(x: jax.Array) -> jax.Array:
    """max(x, 0)^2."""
    return jnp.square(jax.nn.relu(x))


def gelu(x: jax.Array) -> jax.Array:
    """x times the cumulative normal distribution of x. (`jax.nn.gelu` defaults to tanh.)"""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig(abc.ABC):
    """Declares a feed-forward layer. Subclass it as a frozen dataclass to add your own."""

    @abc.abstractmethod
    def build(self, dim: int, rngs: nnx.Rngs, init: Init = DEFAULT) -> Any:
        """The module for model width `dim`. Declare its weights with `param`, whose logical axes
        give their sharding, and multiply by them with `einsum`."""

    def measures(self, sums: Any) -> tuple[dict[str, jax.Array], jax.Array | None]:
        """(auxiliary losses, load) of the `sums` that the module returns besides y, which are added
        over the parts of a batch. Losses include their weights; the load is None if there is none.
        With the sums of several layers stacked, so are both."""
        raise TypeError(f"{type(self).__name__} returns sums, but does not define measures(sums)")

    def active_share(self, axes: tuple[str, ...]) -> float:
        """Share of a weight with these logical axes that one token is multiplied by."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class _MLPConfig(FeedForwardConfig):
    hidden: int
    bias: bool = False

    def __post_init__(self) -> None:
        check_size(**{"model.ffn.hidden": self.hidden})

    @abc.abstractmethod
    def build(self, dim: int, rngs: nnx.Rngs, init: Init = DEFAULT) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class SwiGLU(_MLPConfig):
    """(silu(x gate) * (x up)) down (Shazeer, arXiv:2002.05202)."""

    def build(self, dim: int, rngs: nnx.Rngs, init: Init = DEFAULT) -> "GatedMLP":
        return GatedMLP(dim, self.hidden, jax.nn.silu, bias=self.bias, rngs=rngs, init=init)


@dataclass(frozen=True, kw_only=True)
class GeGLU(_MLPConfig):
    """(gelu(x gate) * (x up)) down, with the tanh form of gelu, as in Gemma (arXiv:2002.05202,
    arXiv:2403.08295)."""

    def build(self, dim: int, rngs: nnx.Rngs, init: Init = DEFAULT) -> "GatedMLP":
        return GatedMLP(dim, self.hidden, jax.nn.gelu, bias=self.bias, rngs=rngs, init=init)


@dataclass(frozen=True, kw_only=True)
class ReLU2(_MLPConfig):
    """max(x up, 0)^2 down (Primer, So et al., arXiv:2109.08668)."""

    def build(self, dim: int, rngs: nnx.Rngs, init: Init = DEFAULT) -> "FeedForward":
        return FeedForward(dim, self.hidden, relu2, bias=self.bias, rngs=rngs, init=init)


@dataclass(frozen=True, kw_only=True)
class MLP(FeedForwardConfig):
    """activation(x up) down: 'gelu' (exact), 'gelu_tanh', 'relu' or 'silu' (Vaswani et al.,
    arXiv:1706.03762)."""

    hidden: int
    activation: str = "gelu"
    bias: bool = False

    def __post_init__(self) -> None:
        check_size(**{"model.ffn.hidden": self.hidden})
        check_name("model.ffn.activation", self.activation, ACTIVATIONS)

    def build(self, dim: int, rngs: nnx.Rngs, init: Init = DEFAULT) -> "FeedForward":
        activation = ACTIVATIONS[self.activation]
        return FeedForward(dim, self.hidden, activation, bias=self.bias, rngs=rngs, init=init)


class GatedMLP(nnx.Module):
    """x_btd -> y_btd = (activation(x gate) * (x up)) down; with silu this is SwiGLU.

    Weights: gate [D, F], up [D, F], down [F, D].
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: Activation = jax.nn.silu,
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
        init: Init = DEFAULT,
    ):
        self.activation = activation
        reads, writes = init.reads(dim, hidden), init.writes(hidden, dim)
        self.gate = param(rngs, (dim, hidden), ("embed", "mlp"), reads)
        self.up = param(rngs, (dim, hidden), ("embed", "mlp"), reads)
        self.down = param(rngs, (hidden, dim), ("mlp", "embed"), writes)
        self.gate_bias = param(rngs, (hidden,), ("mlp",), zeros) if bias else None
        self.up_bias = param(rngs, (hidden,), ("mlp",), zeros) if bias else None
        self.down_bias = param(rngs, (dim,), ("norm",), zeros) if bias else None

    def __call__(self, x_btd: jax.Array, mask_bt: jax.Array | None = None) -> jax.Array:
        up_btf = add_bias(einsum("btd,df->btf", x_btd, self.up), self.up_bias)
        h_btf = checkpoint_name(up_btf, "ffn_hidden")
        gate_btf = add_bias(einsum("btd,df->btf", x_btd, self.gate), self.gate_bias)
        h_btf *= self.activation(checkpoint_name(gate_btf, "ffn_hidden"))
        h_btf = shard(h_btf, "batch", "seq", "mlp")
        return add_bias(einsum("btf,fd->btd", h_btf, self.down), self.down_bias)


class FeedForward(nnx.Module):
    """x_btd -> y_btd = activation(x up) down. Weights: up [D, F], down [F, D]."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: Activation = gelu,
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
        init: Init = DEFAULT,
    ):
        self.activation = activation
        self.up = param(rngs, (dim, hidden), ("embed", "mlp"), init.reads(dim, hidden))
        self.down = param(rngs, (hidden, dim), ("mlp", "embed"), init.writes(hidden, dim))
        self.up_bias = param(rngs, (hidden,), ("mlp",), zeros) if bias else None
        self.down_bias = param(rngs, (dim,), ("norm",), zeros) if bias else None

    def __call__(self, x_btd: jax.Array, mask_bt: jax.Array | None = None) -> jax.Array:
        up_btf = add_bias(einsum("btd,df->btf", x_btd, self.up), self.up_bias)
        h_btf = self.activation(checkpoint_name(up_btf, "ffn_hidden"))
        h_btf = shard(h_btf, "batch", "seq", "mlp")
        return add_bias(einsum("btf,fd->btd", h_btf, self.down), self.down_bias)
