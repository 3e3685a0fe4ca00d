"""Mixture of experts: a router sends each token to `experts_per_token` of `experts` feed-forwards
and adds their outputs by weight (Shazeer et al., arXiv:1701.06538; Fedus et al., arXiv:2101.03961).

Dispatch is dropless (MegaBlocks, arXiv:2211.15841) or bounded by a capacity per expert (GShard,
arXiv:2006.16668); see experts.py. Both give the same numbers on any mesh, because the router sees
the whole batch.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.errors import UserError, check_name, check_not_negative, check_positive
from lm.model.experts import Experts, dropless, token_partition, within_capacity
from lm.model.ffn import ACTIVATIONS, FeedForwardConfig, GatedMLP
from lm.model.initializers import DEFAULT, Init, zeros
from lm.model.param import dense, einsum, param
from lm.parallel.sharding import is_sharded, shard_map


@dataclass(frozen=True, kw_only=True)
class SoftmaxRouter:
    """Weights are the softmax probabilities of the chosen experts. `renormalize` makes them sum to
    one, which equals Mixtral's softmax over the chosen logits (arXiv:2401.04088); Switch does not
    renormalize."""

    renormalize: bool = True

    def scores(self, logits_bte: jax.Array) -> jax.Array:
        """Scores of the experts: positive, with sum one."""
        return jax.nn.softmax(logits_bte)

    def weights(self, scores_btk: jax.Array) -> jax.Array:
        """Weights of the chosen experts' outputs."""
        return _normalized(scores_btk) if self.renormalize else scores_btk


@dataclass(frozen=True, kw_only=True)
class SigmoidRouter:
    """Scores are independent sigmoids; with `renormalize` the chosen weights sum to `scale`
    (DeepSeek-V3, arXiv:2412.19437)."""

    renormalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive(**{"model.ffn.router.scale": self.scale})

    def scores(self, logits_bte: jax.Array) -> jax.Array:
        """Scores of the experts, between zero and one."""
        return jax.nn.sigmoid(logits_bte)

    def weights(self, scores_btk: jax.Array) -> jax.Array:
        """Weights of the chosen experts' outputs."""
        return self.scale * (_normalized(scores_btk) if self.renormalize else scores_btk)


def _normalized(scores: jax.Array) -> jax.Array:
    return scores / (scores.sum(-1, keepdims=True) + 1e-20)  # all sigmoids may underflow


@dataclass(frozen=True, kw_only=True)
class LoadBalance:
    """Auxiliary loss weight * E * sum_e f_e p_e (Switch, GShard), where f_e is the expert's share
    of the assignments and p_e its mean share of the scores. It equals `weight` when both are
    uniform.

    over  "batch": the shares of the whole batch, at every place. With gradient accumulation that
          takes a second forward pass, about a third more time (see lm/training/gradient.py).
          "sequence": the shares of each row, as in DeepSeek-V3 (arXiv:2412.19437); the loss is
          their mean by tokens, and takes no second pass
    """

    weight: float = 0.01
    over: str = "batch"

    def __post_init__(self) -> None:
        check_positive(**{"model.ffn.balance.weight": self.weight})
        check_name("model.ffn.balance.over", self.over, ("batch", "sequence"))


@dataclass(frozen=True, kw_only=True)
class BiasBalance:
    """Auxiliary-loss-free balancing: a bias on the scores, used only to choose experts, moves by
    `rate` after each step towards experts with low load (Wang et al., arXiv:2408.15664). The
    training step calls `update_bias`."""

    rate: float = 0.001

    def __post_init__(self) -> None:
        check_positive(**{"model.ffn.balance.rate": self.rate})


@dataclass(frozen=True, kw_only=True)
class Dropless:
    """Every token reaches all of its experts, for any load."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """An expert takes at most `factor` times its even share of the assignments of a sequence. The
    latest ones beyond it are dropped, so that no token depends on a later one; dropped tokens pass
    through the residual stream."""

    factor: float

    def __post_init__(self) -> None:
        check_positive(**{"model.ffn.dispatch.factor": self.factor})

    def slots(self, length: int, experts_per_token: int, experts: int) -> int:
        """Most assignments of one sequence to one expert; a token chooses an expert only once."""
        return min(length, math.ceil(self.factor * length * experts_per_token / experts))


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Shared expert: a feed-forward of width `hidden` that every token passes (DeepSeekMoE,
    arXiv:2401.06066). `gated` scales its output by a learned sigmoid of the token (Qwen2-MoE,
    arXiv:2407.10671)."""

    hidden: int
    gated: bool = False

    def __post_init__(self) -> None:
        check_positive(**{"model.ffn.shared.hidden": self.hidden})


@dataclass(frozen=True, kw_only=True)
class MoE(FeedForwardConfig):
    """Mixture of `experts` gated feed-forwards of width `hidden`, `experts_per_token` per token.

    `activation` is that of the gates: "silu" gives SwiGLU experts, "gelu_tanh" GeGLU. `z_loss` is
    the weight of the mean squared log-sum-exp of the router's logits (ST-MoE, arXiv:2202.08906).
    """

    experts: int
    experts_per_token: int
    hidden: int
    activation: str = "silu"
    router: SoftmaxRouter | SigmoidRouter = SoftmaxRouter()
    shared: Shared | None = None
    balance: LoadBalance | BiasBalance | None = LoadBalance()
    z_loss: float = 0.0
    dispatch: Dropless | Capacity = Dropless()

    def __post_init__(self) -> None:
        check_positive(
            **{
                "model.ffn.experts": self.experts,
                "model.ffn.experts_per_token": self.experts_per_token,
                "model.ffn.hidden": self.hidden,
            }
        )
        check_name("model.ffn.activation", self.activation, ACTIVATIONS)
        if self.experts_per_token > self.experts:
            raise UserError(
                f"model.ffn.experts_per_token={self.experts_per_token} is more than "
                f"model.ffn.experts={self.experts}; a token chooses each expert at most once."
            )
        check_not_negative(**{"model.ffn.z_loss": self.z_loss})
        if self.experts_per_token == 1 and getattr(self.router, "renormalize", False):
            raise UserError(
                "model.ffn.router.renormalize=True makes every weight one with "
                "model.ffn.experts_per_token=1, and the router would never learn; set it to False."
            )

    def build(self, dim: int, rngs: nnx.Rngs, init: Init = DEFAULT) -> "MixtureOfExperts":
        return MixtureOfExperts(self, dim, rngs=rngs, init=init)

    def measures(self, sums: "Sums") -> tuple[dict[str, jax.Array], jax.Array]:
        return measures(self, sums)

    def active_share(self, axes: tuple[str, ...]) -> float:
        return self.experts_per_token / self.experts if "expert" in axes else 1.0


class Routing(NamedTuple):
    """Experts of each token. A masked token has the non-existent expert E."""

    chosen_btk: jax.Array  # int32
    weights_btk: jax.Array  # float32
    sums: "Sums"


class Sums(NamedTuple):
    """Router statistics of the real tokens, summed in float32. Sums over the parts of a batch add
    up to those of the batch. `measures` computes the auxiliary losses."""

    tokens: jax.Array  # number of tokens
    choices_e: jax.Array  # assignments per expert
    shares_e: jax.Array  # normalized scores per expert
    squares: jax.Array  # squared log-sum-exp of the logits
    balance: jax.Array | None  # f_e p_e of each row times its tokens; for LoadBalance by sequence


def measures(config: "MoE", sums: Sums) -> tuple[dict[str, jax.Array], jax.Array]:
    """The auxiliary losses, times their weights, and the load [E], each expert's share of the
    assignments. Stacked sums of several layers give stacked results."""
    tokens = jnp.maximum(sums.tokens, 1)
    load_e = sums.choices_e / (tokens * config.experts_per_token)[..., None]
    losses = {}
    if isinstance(config.balance, LoadBalance):
        share_e = sums.shares_e / tokens[..., None]
        product = (load_e * share_e).sum(-1) if sums.balance is None else sums.balance / tokens
        losses["balance"] = config.balance.weight * config.experts * product
    if config.z_loss:
        losses["router_z"] = config.z_loss * sums.squares / tokens
    return losses, load_e


class MixtureOfExperts(nnx.Module):
    """x_btd -> (y_btd, Sums). Masked tokens enter no expert and count in no sum.

    Weights: router [D, E], gate and up [E, D, F], down [E, F, D], and those of the shared expert.
    """

    def __init__(self, config: MoE, dim: int, *, rngs: nnx.Rngs, init: Init = DEFAULT):
        experts, hidden = config.experts, config.hidden
        reads, writes = init.reads(dim, hidden), init.writes(hidden, dim)
        self.config = config
        self.router = param(rngs, (dim, experts), ("embed", "router"), init.reads(dim, experts))
        biased = isinstance(config.balance, BiasBalance)
        self.bias = param(rngs, (experts,), ("router",), zeros) if biased else None
        self.gate = param(rngs, (experts, dim, hidden), ("expert", "embed", "mlp"), reads)
        self.up = param(rngs, (experts, dim, hidden), ("expert", "embed", "mlp"), reads)
        self.down = param(rngs, (experts, hidden, dim), ("expert", "mlp", "embed"), writes)
        self.shared = SharedExpert(config, dim, rngs=rngs, init=init) if config.shared else None

    def __call__(
        self, x_btd: jax.Array, mask_bt: jax.Array | None = None
    ) -> tuple[jax.Array, "Sums"]:
        config = self.config
        bias_e = None if self.bias is None else dense(self.bias)
        mask_bt = jnp.ones(x_btd.shape[:2], bool) if mask_bt is None else mask_bt
        routing = route(config, router_logits(x_btd, dense(self.router)), bias_e, mask_bt)
        weights = (dense(self.gate), dense(self.up), dense(self.down))
        experts, choices = Experts(config.activation, *weights), routing[:2]
        if isinstance(config.dispatch, Dropless):
            y_btd = dropless(x_btd, *choices, experts)
        else:
            slots = config.dispatch.slots(x_btd.shape[1], config.experts_per_token, config.experts)
            y_btd = within_capacity(x_btd, *choices, experts, slots)
        if self.shared is not None:
            y_btd += self.shared(x_btd)
        return y_btd, routing.sums


class SharedExpert(nnx.Module):
    """x_btd -> y_btd: a feed-forward that every token passes."""

    def __init__(self, config: MoE, dim: int, *, rngs: nnx.Rngs, init: Init = DEFAULT):
        activation, hidden = ACTIVATIONS[config.activation], config.shared.hidden
        self.ffn = GatedMLP(dim, hidden, activation, rngs=rngs, init=init)
        gated = config.shared.gated
        self.gate = (
            param(rngs, (dim, 1), ("embed", "router"), init.reads(dim, 1)) if gated else None
        )

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        y_btd = self.ffn(x_btd)
        if self.gate is None:
            return y_btd
        return y_btd * jax.nn.sigmoid(einsum("btd,de->bte", x_btd, self.gate))


# Routing


def router_logits(x_btd: jax.Array, w_de: jax.Array) -> jax.Array:
    """Router logits in float32 at the highest matmul precision, because near-ties decide the
    choice."""
    x_btd, w_de = x_btd.astype(jnp.float32), w_de.astype(jnp.float32)
    return jnp.einsum("btd,de->bte", x_btd, w_de, precision=jax.lax.Precision.HIGHEST)


def route(
    config: MoE, logits_bte: jax.Array, bias_e: jax.Array | None, mask_bt: jax.Array
) -> Routing:
    """Chooses experts from the router's logits and sums the router statistics."""
    experts = config.experts
    scores_bte = config.router.scores(logits_bte)
    ranks_bte = jax.lax.stop_gradient(scores_bte)
    if bias_e is not None:
        ranks_bte += jax.lax.stop_gradient(bias_e)
    chosen_btk = _choose(ranks_bte, config.experts_per_token)
    weights_btk = config.router.weights(jnp.take_along_axis(scores_bte, chosen_btk, axis=-1))
    chosen_btk = jnp.where(mask_bt[..., None], chosen_btk, experts)

    mask_bt1 = mask_bt[..., None].astype(jnp.float32)
    squared_bt1 = jax.nn.logsumexp(logits_bte, axis=-1, keepdims=True) ** 2
    sums = Sums(
        tokens=mask_bt1.sum(),
        choices_e=jax.nn.one_hot(chosen_btk, experts).sum((0, 1, 2)),
        shares_e=(mask_bt1 * _normalized(scores_bte)).sum((0, 1)),
        squares=(mask_bt1 * squared_bt1).sum(),
        balance=_balance_by_row(config, chosen_btk, scores_bte, mask_bt1),
    )
    return Routing(chosen_btk, weights_btk, sums)


def _balance_by_row(
    config: MoE, chosen_btk: jax.Array, scores_bte: jax.Array, mask_bt1: jax.Array
) -> jax.Array | None:
    balance = config.balance
    if not isinstance(balance, LoadBalance) or balance.over == "batch":
        return None
    choices_be = jax.nn.one_hot(chosen_btk, config.experts).sum((1, 2))
    shares_be = (mask_bt1 * _normalized(scores_bte)).sum(1)
    tokens_b1 = jnp.maximum(mask_bt1.sum(1), 1)
    return (choices_be * shares_be / (tokens_b1 * config.experts_per_token)).sum()


def _choose(ranks_bte: jax.Array, experts_per_token: int) -> jax.Array:
    """The experts of the highest rank, best first; ties go to the lower index."""

    def choose(ranks_bte: jax.Array) -> jax.Array:
        return jax.lax.top_k(ranks_bte, experts_per_token)[1]

    if not is_sharded():
        return choose(ranks_bte)
    # Without shard_map XLA gathers the whole batch on every device for a top-k.
    return shard_map(choose, (token_partition(),), token_partition())(ranks_bte)


def update_bias(bias_e: jax.Array, load_e: jax.Array, rate: float) -> jax.Array:
    """Raises the bias of experts below the mean load by `rate` and lowers the others'.

    Both arrays are [..., E]; called once a step with the load of its whole batch, outside the
    gradient.
    """
    mean_e1 = load_e.mean(-1, keepdims=True)
    missing_e = mean_e1 - load_e
    # A load that equals the mean up to rounding counts as the mean.
    return bias_e + rate * jnp.where(abs(missing_e) > 1e-5 * mean_e1, jnp.sign(missing_e), 0)
