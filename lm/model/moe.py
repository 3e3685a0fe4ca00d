"""Mixture of experts: a router sends each token to `experts_per_token` of `experts` feed-forwards and adds
their outputs by weight (Shazeer et al., arXiv:1701.06538; Fedus et al., arXiv:2101.03961).

Tokens meet experts in one of two ways, which agree while no expert is full. Dropless: tokens are
sorted by expert for one grouped matrix product (MegaBlocks, arXiv:2211.15841), on other devices
where experts lie there (exchange_rows.py). Capacity: an expert
takes a bounded number of tokens of each sequence (GShard, arXiv:2006.16668). Both give the numbers
of one device on any mesh: the router sees the whole batch under automatic sharding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from kernels_pallas import grouped_matmul, placement
from lm.errors import UserError, check_name, check_positive
from lm.model.exchange_rows import buffer_rows, on_experts
from lm.model.ffn import ACTIVATIONS, FeedForward
from lm.model.param import Init, einsum, param, zeros
from lm.parallel.sharding import (
    context_parallel_size,
    is_sharded,
    partition,
    remaining,
    shard,
    shard_map,
    split_over,
    weight_partition,
)


@dataclass(frozen=True, kw_only=True)
class SoftmaxRouter:
    """Weights are the chosen experts' softmax probabilities. `renormalize` makes them sum to one,
    which equals Mixtral's softmax over the chosen logits (arXiv:2401.04088); without it they shrink
    when the router is unsure, as in Switch."""

    renormalize: bool = True

    def scores(self, logits_bte: jax.Array) -> jax.Array:
        """Each expert's share: positive, of sum one."""
        return jax.nn.softmax(logits_bte)

    def weights(self, scores_btk: jax.Array) -> jax.Array:
        """How much each chosen expert's output counts."""
        return _normalized(scores_btk) if self.renormalize else scores_btk


@dataclass(frozen=True, kw_only=True)
class SigmoidRouter:
    """Experts are scored one by one; with `renormalize` the chosen weights sum to `scale`
    (DeepSeek-V3, arXiv:2412.19437)."""

    renormalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive(**{"model.ffn.router.scale": self.scale})

    def scores(self, logits_bte: jax.Array) -> jax.Array:
        """Each expert's own score, between zero and one."""
        return jax.nn.sigmoid(logits_bte)

    def weights(self, scores_btk: jax.Array) -> jax.Array:
        """How much each chosen expert's output counts."""
        return self.scale * (_normalized(scores_btk) if self.renormalize else scores_btk)


def _normalized(scores: jax.Array) -> jax.Array:
    return scores / (scores.sum(-1, keepdims=True) + 1e-20)  # sigmoids may all underflow


@dataclass(frozen=True, kw_only=True)
class LoadBalance:
    """The loss weight * E * sum_e f_e p_e of Switch and GShard, with f_e an expert's share of the
    assignments and p_e its mean share of the scores: `weight` when both are uniform, more when they
    lean towards the same experts."""

    weight: float = 0.01

    def __post_init__(self) -> None:
        check_positive(**{"model.ffn.balance.weight": self.weight})


@dataclass(frozen=True, kw_only=True)
class BiasBalance:
    """No loss: a bias, used for choosing only, moves by `rate` after each step towards experts with
    little load (Wang et al., arXiv:2408.15664). The step calls `update_bias`."""

    rate: float = 0.001

    def __post_init__(self) -> None:
        check_positive(**{"model.ffn.balance.rate": self.rate})


@dataclass(frozen=True, kw_only=True)
class Dropless:
    """Every token reaches all of its experts, however uneven the load."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """An expert takes at most `factor` times its even share of a sequence's assignments. The latest
    ones over it are dropped (so no token depends on a later one) and their residual passes."""

    factor: float

    def __post_init__(self) -> None:
        check_positive(**{"model.ffn.dispatch.factor": self.factor})

    def slots(self, length: int, experts_per_token: int, experts: int) -> int:
        """Assignments that one expert takes of a sequence; a token chooses an expert only once."""
        return min(length, math.ceil(self.factor * length * experts_per_token / experts))


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A feed-forward of width `hidden`, of the experts' kind, that every token passes besides them
    (DeepSeekMoE, arXiv:2401.06066); `gated` scales it by a learned sigmoid of the token (Qwen2-MoE,
    arXiv:2407.10671)."""

    hidden: int
    gated: bool = False

    def __post_init__(self) -> None:
        check_positive(**{"model.ffn.shared.hidden": self.hidden})


@dataclass(frozen=True, kw_only=True)
class MoE:
    """`experts` gated feed-forwards of width `hidden`, `experts_per_token` of them for each token.

    `activation` applies to the gates: "silu" makes SwiGLU experts, "gelu_tanh" GeGLU. `z_loss`
    weighs the mean squared log-sum-exp of the router's logits (ST-MoE, arXiv:2202.08906).
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
                f"model.ffn.experts_per_token={self.experts_per_token} is more than model.ffn.experts={self.experts}; "
                "a token chooses each expert at most once."
            )
        if self.z_loss < 0:
            raise UserError(
                f"model.ffn.z_loss={self.z_loss} must not be negative; 0 leaves it out."
            )
        if self.experts_per_token == 1 and getattr(self.router, "renormalize", False):
            raise UserError(
                "model.ffn.router.renormalize=True makes every weight one with model.ffn.experts_per_token=1, "
                "and the router would never learn; set it to False."
            )

    def build(self, dim: int, rngs: nnx.Rngs, init: Init) -> "Module":
        """The module for tokens of width `dim`."""
        return Module(self, dim, rngs, init)


class Routing(NamedTuple):
    """Where each token goes. A masked token chooses expert E, which does not exist."""

    chosen_btk: jax.Array  # int32
    weights_btk: jax.Array  # float32
    sums: "Sums"


class Sums(NamedTuple):
    """What a layer measures of its real tokens, in float32: added over the parts of a batch, it is
    that of the batch. `measures` makes losses of it."""

    tokens: jax.Array  # how many
    choices_e: jax.Array  # of each expert
    shares_e: jax.Array  # of the scores that each expert got
    squares: jax.Array  # of the log-sum-exp of the logits


def measures(config: "MoE", sums: Sums) -> tuple[dict[str, jax.Array], jax.Array]:
    """The side losses, which carry their coefficients, and the load: each expert's share of the
    choices, [E]. With sums of several layers stacked, so are both."""
    tokens = jnp.maximum(sums.tokens, 1)
    load_e = sums.choices_e / (tokens * config.experts_per_token)[..., None]
    losses = {}
    if isinstance(config.balance, LoadBalance):
        share_e = sums.shares_e / tokens[..., None]
        losses["balance"] = config.balance.weight * config.experts * (load_e * share_e).sum(-1)
    if config.z_loss:
        losses["router_z"] = config.z_loss * sums.squares / tokens
    return losses, load_e


class Module(nnx.Module):
    """Called with x [B, T, D] and, where there is padding, mask [B, T], true on real tokens.

    Returns y [B, T, D] and the Sums. Masked tokens enter no expert and count in no sum.
    """

    def __init__(self, config: MoE, dim: int, rngs: nnx.Rngs, init: Init):
        experts, hidden = config.experts, config.hidden
        reads, writes = init.reads(dim, hidden), init.writes(hidden, dim)
        self.config = config
        self.router = param(rngs, (dim, experts), ("embed", "router"), init.reads(dim, experts))
        biased = isinstance(config.balance, BiasBalance)
        self.bias = param(rngs, (experts,), ("router",), zeros) if biased else None
        self.gate = param(rngs, (experts, dim, hidden), ("expert", "embed", "mlp"), reads)
        self.up = param(rngs, (experts, dim, hidden), ("expert", "embed", "mlp"), reads)
        self.down = param(rngs, (experts, hidden, dim), ("expert", "mlp", "embed"), writes)
        self.shared = SharedExpert(config, dim, rngs, init) if config.shared else None

    def __call__(
        self, x_btd: jax.Array, mask_bt: jax.Array | None = None
    ) -> tuple[jax.Array, Sums]:
        config = self.config
        bias_e = None if self.bias is None else self.bias[...]
        mask_bt = jnp.ones(x_btd.shape[:2], bool) if mask_bt is None else mask_bt
        routing = route(config, router_logits(x_btd, self.router[...]), bias_e, mask_bt)
        experts = Experts(config.activation, self.gate[...], self.up[...], self.down[...])
        if isinstance(config.dispatch, Dropless):
            y_btd = _dropless(x_btd, routing, experts)
        else:
            slots = config.dispatch.slots(x_btd.shape[1], config.experts_per_token, config.experts)
            y_btd = _within_capacity(x_btd, routing, experts, slots)
        if self.shared is not None:
            y_btd += self.shared(x_btd)
        return y_btd, routing.sums


class SharedExpert(nnx.Module):
    """What every token passes."""

    def __init__(self, config: MoE, dim: int, rngs: nnx.Rngs, init: Init):
        activation = ACTIVATIONS[config.activation]
        self.ffn = FeedForward(dim, config.shared.hidden, activation, True, False, rngs, init)
        gated = config.shared.gated
        self.gate = (
            param(rngs, (dim, 1), ("embed", "router"), init.reads(dim, 1)) if gated else None
        )

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        y_btd, _ = self.ffn(x_btd)
        if self.gate is None:
            return y_btd
        return y_btd * jax.nn.sigmoid(einsum("btd,de->bte", x_btd, self.gate))


# Routing


def _tokens() -> PartitionSpec:
    """Of the batch and sequence axes of the activations."""
    return PartitionSpec(remaining("pipe", "data", "fsdp", "expert"), "context")


def router_logits(x_btd: jax.Array, w_de: jax.Array) -> jax.Array:
    """In float32, true float32 on every chip: near-ties decide where a token goes."""
    x_btd, w_de = x_btd.astype(jnp.float32), w_de.astype(jnp.float32)
    return jnp.einsum("btd,de->bte", x_btd, w_de, precision=jax.lax.Precision.HIGHEST)


def route(
    config: MoE, logits_bte: jax.Array, bias_e: jax.Array | None, mask_bt: jax.Array
) -> Routing:
    """Chooses experts from the router's logits and measures the choice over the whole batch."""
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
    )
    return Routing(chosen_btk, weights_btk, sums)


def _choose(ranks_bte: jax.Array, experts_per_token: int) -> jax.Array:
    """The `experts_per_token` experts of the highest rank, best first; ties go to the lower index."""

    def choose(ranks_bte: jax.Array) -> jax.Array:
        return jax.lax.top_k(ranks_bte, experts_per_token)[1]

    if not is_sharded():
        return choose(ranks_bte)
    # By itself XLA gathers the whole batch on every device for a top-k.
    return shard_map(choose, (_tokens(),), _tokens())(ranks_bte)


def update_bias(bias_e: jax.Array, load_e: jax.Array, rate: float) -> jax.Array:
    """Raises the bias of experts below the mean load by `rate` and lowers the others'.

    Both arrays are [..., E]; called once a step with the load of its whole batch, outside the
    gradient.
    """
    mean_e1 = load_e.mean(-1, keepdims=True)
    missing_e = mean_e1 - load_e
    # A load that is the mean up to rounding is the mean, or the sign would be that of the rounding.
    return bias_e + rate * jnp.where(abs(missing_e) > 1e-5 * mean_e1, jnp.sign(missing_e), 0)


# Experts


class Experts(NamedTuple):
    """The weights of all experts, or of those on this device."""

    activation: str
    gate_edf: jax.Array
    up_edf: jax.Array
    down_efd: jax.Array

    @property
    def count(self) -> int:
        """E, or this device's part of it."""
        return self.gate_edf.shape[0]


def _dropless(x_btd: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    chosen_btk, weights_btk = routing.chosen_btk, routing.weights_btk
    activation, *arrays = experts
    if not is_sharded():
        feed = partial(_feed, activation, arrays)
        return _sorted_by_expert(x_btd, chosen_btk, weights_btk, experts.count, feed)
    wide = weight_partition(("expert", "embed", "mlp"), experts.gate_edf.shape)
    narrow = weight_partition(("expert", "mlp", "embed"), experts.down_efd.shape)
    embed = wide[1] or ()

    def local(
        x_btd: jax.Array, chosen_btk: jax.Array, weights_btk: jax.Array, *arrays: jax.Array
    ) -> jax.Array:
        # Said here, gradients are summed over `tensor` once a token and not once an assignment.
        x_btd, weights_btk = (
            jax.lax.pcast(a, "tensor", to="varying") for a in (x_btd, weights_btk)
        )
        mine = [
            jax.lax.all_gather(w, embed, axis=axis, tiled=True)
            for w, axis in zip(arrays, (1, 1, 2), strict=True)
        ]
        feed = partial(_feed, activation, mine)
        if mine[0].shape[0] < experts.count:
            feed = partial(_feed_far, activation, mine, chosen_btk.shape)
        y_btd = _sorted_by_expert(x_btd, chosen_btk, weights_btk, experts.count, feed)
        if scattered:
            return jax.lax.psum_scatter(y_btd, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(y_btd, "tensor")

    tokens = _tokens()
    scattered = "tensor" in split_over(partition(x_btd.shape, "batch", "stream", "embed")[1])
    stream = PartitionSpec(tokens[0], ("context", "tensor")) if scattered else tokens
    mapped = shard_map(local, (tokens, tokens, tokens, wide, wide, narrow), stream)
    return mapped(x_btd, chosen_btk, weights_btk, *arrays)


def _sorted_by_expert(
    x_btd: jax.Array,
    chosen_btk: jax.Array,
    weights_btk: jax.Array,
    experts: int,
    feed: Callable[[tuple[jax.Array, jax.Array], jax.Array], jax.Array],
) -> jax.Array:
    """Each row beside its weight, and how many there are for each expert, go through `feed`.
    Assignments to expert `experts`, which does not exist, add nothing."""
    chosen_m = chosen_btk.reshape(-1)
    order_m = jnp.argsort(chosen_m)
    place_m = jnp.argsort(order_m)
    sizes_e = _count(chosen_m, experts)
    x_md = _move(_per_choice(x_btd, chosen_btk), order_m, place_m)
    weights_m1 = _move(weights_btk.reshape(-1, 1), order_m, place_m)
    y_md = _move(feed((x_md, weights_m1), sizes_e), place_m, order_m)
    return y_md.reshape(*chosen_btk.shape, -1).sum(2)


def _feed(
    activation: str,
    arrays: Sequence[jax.Array],
    rows: tuple[jax.Array, jax.Array],
    sizes_e: jax.Array,
) -> jax.Array:
    """Each row through its expert. It is weighted before the last product, whose result the
    backward pass then does not need."""
    gate_edf, up_edf, down_efd = arrays
    x_md, weights_m1 = rows
    gate_mf = ACTIVATIONS[activation](grouped_matmul(x_md, gate_edf, sizes_e))
    up_mf = grouped_matmul(x_md, up_edf, sizes_e)
    return grouped_matmul((gate_mf * up_mf * weights_m1).astype(x_md.dtype), down_efd, sizes_e)


def _feed_far(
    activation: str,
    mine: Sequence[jax.Array],
    choices: tuple[int, int, int],
    rows: tuple[jax.Array, jax.Array],
    sizes_e: jax.Array,
) -> jax.Array:
    """The same where this device has only its own experts: rows travel to theirs, and back."""
    b, t, k = choices
    most = jax.lax.axis_size("expert") * b * t * min(k, mine[0].shape[0])

    def feed(rows: tuple[jax.Array, jax.Array], sizes_g: jax.Array, mine: Any) -> jax.Array:
        return _feed(activation, mine, rows, sizes_g)

    return on_experts(feed, buffer_rows(b * t * k, most), sizes_e, rows, mine)


def _within_capacity(x_btd: jax.Array, routing: Routing, experts: Experts, slots: int) -> jax.Array:
    """Slots lie sequence by sequence, so that the result does not depend on the mesh; between the
    two constraints on each side XLA exchanges tokens by all-to-all over the expert axis."""
    chosen_btk, weights_btk = routing.chosen_btk, routing.weights_btk
    b, t, d = x_btd.shape
    e, k = experts.count, chosen_btk.shape[-1]
    # Where rows are split, tokens do not lie in the order of the sequence.
    index_t = placement(t, context_parallel_size()) if context_parallel_size() > 1 else np.arange(t)
    fill = jax.vmap(lambda chosen_m: _fill_slots(chosen_m, np.repeat(index_t, k), e, slots))
    source_bs, slot_bm = fill(chosen_btk.reshape(b, t * k))
    move = jax.vmap(_move)

    x_bsd = move(_per_choice(x_btd, chosen_btk).reshape(b, t * k, d), source_bs, slot_bm)
    x_bsd = shard(x_bsd, "batch", "capacity", "embed")
    x_becd = shard(x_bsd.reshape(b, e, slots, d), "group", "expert", "capacity", "embed")
    gate_becf = jnp.einsum("becd,edf->becf", x_becd, experts.gate_edf)
    gate_becf = ACTIVATIONS[experts.activation](
        shard(gate_becf, "group", "expert", "capacity", "mlp")
    )
    up_becf = jnp.einsum("becd,edf->becf", x_becd, experts.up_edf)
    y_becd = jnp.einsum("becf,efd->becd", gate_becf * up_becf, experts.down_efd)
    y_becd = shard(y_becd, "group", "expert", "capacity", "embed")
    y_bsd = shard(y_becd.reshape(b, e * slots, d), "batch", "capacity", "embed")
    return _combine(move(y_bsd, slot_bm, source_bs), weights_btk)


def _fill_slots(
    chosen_m: jax.Array, index_m: np.ndarray, experts: int, slots: int
) -> tuple[jax.Array, jax.Array]:
    """Expert e's slots are e * slots and following; its first assignments in the sequence, by the
    `index` of their tokens, get them.

    Returns the assignment in each slot [E * slots], M where it is empty, and the slot of each
    assignment [M], E * slots where it has none.
    """
    order_m = jnp.lexsort((index_m, chosen_m))
    sizes_e = _count(chosen_m, experts)
    starts_e = jnp.cumsum(sizes_e) - sizes_e
    places_ec = jnp.arange(slots) + starts_e[:, None]
    taken_ec = jnp.arange(slots) < sizes_e[:, None]
    source_ec = jnp.where(taken_ec, order_m.at[places_ec].get(mode="clip"), chosen_m.size)

    rank_m = jnp.argsort(order_m) - starts_e.at[chosen_m].get(mode="clip")
    kept_m = (chosen_m < experts) & (rank_m < slots)
    slot_m = jnp.where(kept_m, chosen_m * slots + rank_m, experts * slots)
    return source_ec.reshape(-1), slot_m


def _count(chosen_m: jax.Array, experts: int) -> jax.Array:
    return (chosen_m[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)


def _per_choice(x_btd: jax.Array, chosen_btk: jax.Array) -> jax.Array:
    """One row for each choice of each token: [B * T * K, D]."""
    d = x_btd.shape[-1]
    return jnp.broadcast_to(x_btd[:, :, None], (*chosen_btk.shape, d)).reshape(-1, d)


def _combine(y: jax.Array, weights_btk: jax.Array) -> jax.Array:
    """The inverse of _per_choice: the weighted sum over the choices of each token."""
    y_btkd = y.reshape(*weights_btk.shape, y.shape[-1])
    return jnp.einsum("btkd,btk->btd", y_btkd, weights_btk.astype(y.dtype))


@jax.custom_vjp
def _move(x_md: jax.Array, source_n: jax.Array, target_m: jax.Array) -> jax.Array:
    """Rows to new places: y[n] = x[source[n]], or zero where source[n] is M.

    `target` is the inverse: row m goes to y[target[m]], or nowhere where target[m] is N. Knowing
    both makes the gradient a gather like this one instead of a scatter-add.
    """
    return x_md.at[source_n].get(mode="fill", fill_value=0)


def _move_forward(x_md: jax.Array, source_n: jax.Array, target_m: jax.Array):
    return _move(x_md, source_n, target_m), (source_n, target_m)


def _move_backward(places: tuple[jax.Array, jax.Array], dy_nd: jax.Array):
    source_n, target_m = places
    return _move(dy_nd, target_m, source_n), None, None


_move.defvjp(_move_forward, _move_backward)
