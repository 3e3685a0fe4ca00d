"""Feed-forward layers. Each config builds a module that is called as (x_btd, mask_bt) -> (y_btd,
losses, load), like MoE's; dense ones ignore the mask (true on real tokens), and have no losses and
no load."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm.errors import check_name, check_positive
from lm.model.param import Init, add_bias, einsum, param, zeros
from lm.parallel.sharding import shard

Activation = Callable[[jax.Array], jax.Array]


def relu2(x: jax.Array) -> jax.Array:
    """max(x, 0)^2."""
    return jnp.square(jax.nn.relu(x))


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function of x."""
    return jax.nn.gelu(x, approximate=False)


# jax.nn.gelu alone is the tanh approximation.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclass(frozen=True, kw_only=True)
class SwiGLU:
    """(silu(x gate) * (x up)) down (Shazeer, arXiv:2002.05202)."""

    hidden: int
    bias: bool = False

    def __post_init__(self) -> None:
        check_positive(**{"model.ffn.hidden": self.hidden})

    def build(self, dim: int, rngs: nnx.Rngs, init: Init) -> "FeedForward":
        return FeedForward(dim, self.hidden, jax.nn.silu, True, self.bias, rngs, init)


@dataclass(frozen=True, kw_only=True)
class GeGLU:
    """(gelu(x gate) * (x up)) down, with the tanh form of gelu, as in Gemma (arXiv:2002.05202,
    arXiv:2403.08295)."""

    hidden: int
    bias: bool = False

    def __post_init__(self) -> None:
        check_positive(**{"model.ffn.hidden": self.hidden})

    def build(self, dim: int, rngs: nnx.Rngs, init: Init) -> "FeedForward":
        return FeedForward(dim, self.hidden, jax.nn.gelu, True, self.bias, rngs, init)


@dataclass(frozen=True, kw_only=True)
class ReLU2:
    """max(x up, 0)^2 down (Primer, So et al., arXiv:2109.08668)."""

    hidden: int
    bias: bool = False

    def __post_init__(self) -> None:
        check_positive(**{"model.ffn.hidden": self.hidden})

    def build(self, dim: int, rngs: nnx.Rngs, init: Init) -> "FeedForward":
        return FeedForward(dim, self.hidden, relu2, False, self.bias, rngs, init)


@dataclass(frozen=True, kw_only=True)
class MLP:
    """activation(x up) down: 'gelu' (exact), 'gelu_tanh', 'relu' or 'silu' (Vaswani et al.,
    arXiv:1706.03762)."""

    hidden: int
    activation: str = "gelu"
    bias: bool = False

    def __post_init__(self) -> None:
        check_positive(**{"model.ffn.hidden": self.hidden})
        check_name("model.ffn.activation", self.activation, ACTIVATIONS)

    def build(self, dim: int, rngs: nnx.Rngs, init: Init) -> "FeedForward":
        activation = ACTIVATIONS[self.activation]
        return FeedForward(dim, self.hidden, activation, False, self.bias, rngs, init)


class FeedForward(nnx.Module):
    """Up, activation, down; the activation applies to a gate that multiplies the rest, where there
    is one."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: Activation,
        gated: bool,
        bias: bool,
        rngs: nnx.Rngs,
        init: Init,
    ):
        self.activation = activation
        reads, writes = init.reads(dim, hidden), init.writes(hidden, dim)
        self.gate = param(rngs, (dim, hidden), ("embed", "mlp"), reads) if gated else None
        self.up = param(rngs, (dim, hidden), ("embed", "mlp"), reads)
        self.down = param(rngs, (hidden, dim), ("mlp", "embed"), writes)
        self.gate_bias = param(rngs, (hidden,), ("mlp",), zeros) if gated and bias else None
        self.up_bias = param(rngs, (hidden,), ("mlp",), zeros) if bias else None
        self.down_bias = param(rngs, (dim,), ("norm",), zeros) if bias else None

    def __call__(
        self, x_btd: jax.Array, mask_bt: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        up_btf = add_bias(einsum("btd,df->btf", x_btd, self.up), self.up_bias)
        h_btf = checkpoint_name(up_btf, "ffn_hidden")
        if self.gate is None:
            h_btf = self.activation(h_btf)
        else:
            gate_btf = add_bias(einsum("btd,df->btf", x_btd, self.gate), self.gate_bias)
            h_btf *= self.activation(checkpoint_name(gate_btf, "ffn_hidden"))
        h_btf = shard(h_btf, "batch", "seq", "mlp")
        return add_bias(einsum("btf,fd->btd", h_btf, self.down), self.down_bias), None
