"""Optimizers as dataclasses; `build` makes the optax transformation: direction, weight decay,
learning rate.

What a leaf is (a matrix, a stack of them, an embedding, a vector) is read from its logical axes,
never from its name or rank. Stacked layers and experts are separate matrices to every optimizer:
training a stack equals training its layers one by one. A leaf whose gradient is zero and which does
not decay (a router's balancing bias) is never moved by any of them.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm import trees
from lm.errors import UserError, check_name, check_positive

ScheduleFunction = Callable[[jax.Array], jax.Array]  # step -> learning rate

# Quintic Newton-Schulz iteration whose slope at zero is steep, so that five rounds suffice (Jordan
# 2024, "Muon").
_NEWTON_SCHULZ, _ROUNDS = (3.4445, -4.7750, 2.0315), 5


class Layout(NamedTuple):
    """How an array's dimensions make a stack of matrices: `batch` leading dimensions, then rows,
    then columns.

    A vector has no columns. Heads and head width together are one side: q [D, N, H] is D x (N*H).
    """

    batch: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, axes: Sequence[str]) -> "Layout":
        """From logical axes: leading 'layers' and 'expert' stack; a 'norm' is never a matrix."""
        batch = next((i for i, a in enumerate(axes) if a not in ("layers", "expert")), len(axes))
        sides: list[tuple[int, ...]] = []
        for i in range(batch, len(axes)):
            if axes[i] == "head" and sides and axes[i - 1] in ("heads", "kv_heads"):
                sides[-1] += (i,)
            else:
                sides.append((i,))
        if len(sides) < 2 or "norm" in axes:
            return cls(batch, tuple(range(batch, len(axes))), ())
        return cls(batch, sides[0], tuple(i for side in sides[1:] for i in side))

    @property
    def inside(self) -> tuple[int, ...]:
        """The dimensions of one matrix or vector of the stack."""
        return self.rows + self.columns


def decays(axes: Sequence[str], decay_embedding: bool = True) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases, sinks; to the embedding
    [vocab, embed] by choice."""
    layout = Layout.of(axes)
    embedding = axes[layout.batch : layout.batch + 1] == ("vocab",)
    return bool(layout.columns) and (decay_embedding or not embedding)


def is_hidden_matrix(axes: Sequence[str]) -> bool:
    """Whether Muon orthogonalises it: matrices except embedding, unembedding and routers."""
    layout = Layout.of(axes)
    outer = {"vocab", "router"} & set(axes) or "expert" in axes[layout.batch :]
    return bool(layout.columns) and not outer


@dataclass(frozen=True, kw_only=True)
class _Base(abc.ABC):
    """What all share. Decay is decoupled: w -= learning_rate * (direction + weight_decay * w) for
    the leaves of `decays`.

    `clip_norm` bounds the global norm of the gradient (None: no bound). The training step does it,
    on the gradient averaged over all micro-batches, where it computes that norm for the metrics;
    the transformation itself does not clip.
    """

    weight_decay: float = 0.0
    decay_embedding: bool = True
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.weight_decay < 0:
            raise UserError(f"optimizer.weight_decay={self.weight_decay!r} must be zero or above.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(
                f"optimizer.clip_norm={self.clip_norm!r} must be above zero; "
                "None turns clipping off."
            )
        for name in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, name, 0) < 1:
                raise UserError(
                    f"optimizer.{name}={getattr(self, name)!r} must be at least 0 and below 1."
                )
        if hasattr(self, "eps"):
            check_positive(**{"optimizer.eps": self.eps})
        if hasattr(self, "moments"):
            check_name("optimizer.moments", self.moments, ("float32", "bfloat16"))

    def build(
        self, schedule: ScheduleFunction, axes: trees.Tree
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters with these logical `axes` (nested dicts of tuples).

        `update(gradients, state, params, step=step)` returns what to add to the parameters. The
        learning rate is schedule(step) of the given step, so a skipped update does not delay the
        schedule.
        """
        mask = trees.map_with_path(lambda _, a: decays(a, self.decay_embedding), axes)
        links = [self._direction(axes), _decay(self.weight_decay, mask), *self._rescale(axes)]
        return optax.with_extra_args_support(optax.chain(*links, _descend(schedule)))

    @abc.abstractmethod
    def _direction(self, axes: trees.Tree) -> optax.GradientTransformation:
        """What turns gradients into directions of descent."""

    def _rescale(self, axes: trees.Tree) -> list[optax.GradientTransformation]:
        return []


@dataclass(frozen=True, kw_only=True)
class AdamW(_Base):
    """Adam with decoupled decay (Loshchilov & Hutter, arXiv:1711.05101).

    `moments` is the format of the first moment; the second stays float32, where a change by 1 - b2
    does not round away.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    moments: str = "float32"

    def _direction(self, axes: trees.Tree) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.moments)


@dataclass(frozen=True, kw_only=True)
class SGD(_Base):
    """Stochastic gradient descent, m = momentum * m + g; with `nesterov` the direction is momentum
    * m + g."""

    momentum: float = 0.0
    nesterov: bool = False
    moments: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise UserError(
                "optimizer.nesterov=True needs optimizer.momentum above zero, for example 0.9."
            )

    def _direction(self, axes: trees.Tree) -> optax.GradientTransformation:
        if not self.momentum:
            return optax.identity()
        return optax.trace(self.momentum, self.nesterov, self.moments)


@dataclass(frozen=True, kw_only=True)
class Lion(_Base):
    """The sign of interpolated momentum (Chen et al., arXiv:2302.06675). Wants a learning rate 3 to
    10 times below AdamW's and a decay as much above."""

    b1: float = 0.9
    b2: float = 0.99
    moments: str = "float32"

    def _direction(self, axes: trees.Tree) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2, mu_dtype=self.moments)


@dataclass(frozen=True, kw_only=True)
class Adafactor(_Base):
    """Second moments as row and column means (Shazeer & Stern, arXiv:1804.04235), without momentum.

    exponent           the second moment's decay is 1 - t**-exponent
    clip_update        bound on the root mean square of one matrix's direction
    parameter_scale    scales each direction by its parameter's root mean square, taken as at least
                       this (1e-3 in the paper); None takes the learning rate as it is
    factor_above       a matrix is factored when both its sides are at least this long
    """

    exponent: float = 0.8
    clip_update: float = 1.0
    parameter_scale: float | None = None
    factor_above: int = 128
    eps: float = 1e-30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            **{
                "optimizer.exponent": self.exponent,
                "optimizer.clip_update": self.clip_update,
                "optimizer.factor_above": self.factor_above,
            }
        )

    def _direction(self, axes: trees.Tree) -> optax.GradientTransformation:
        return _scale_by_factors(self, axes)


@dataclass(frozen=True, kw_only=True)
class LAMB(_Base):
    """Adam whose step on each matrix is as long as a share of that matrix (You et al.,
    arXiv:1904.00962), for large batches."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    moments: str = "float32"

    def _direction(self, axes: trees.Tree) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.moments)

    def _rescale(self, axes: trees.Tree) -> list[optax.GradientTransformation]:
        return [_trust_ratio(axes)]


@dataclass(frozen=True, kw_only=True)
class Muon(_Base):
    """Nesterov momentum made orthogonal for hidden matrices, Adam for embedding, unembedding,
    routers and vectors (Jordan 2024).

    An orthogonal m x n matrix has root mean square 1/sqrt(max(m, n)); it is multiplied by rms *
    sqrt(max(m, n)), and 0.2 is what AdamW's steps measure, so one learning rate and one decay serve
    both halves (Moonlight, arXiv:2502.16982).
    """

    momentum: float = 0.95
    rms: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    moments: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(**{"optimizer.rms": self.rms})

    def _direction(self, axes: trees.Tree) -> optax.GradientTransformation:
        return _scale_by_muon(self, axes)


Optimizer = AdamW | SGD | Lion | Adafactor | LAMB | Muon


def _decay(weight_decay: float, mask: trees.Tree) -> optax.GradientTransformation:
    """Adds weight_decay * parameter where the mask is true."""
    if not weight_decay:
        return optax.identity()
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda u, p, yes: u + weight_decay * p if yes else u, updates, params, mask
        )
    )


def _descend(schedule: ScheduleFunction) -> optax.GradientTransformationExtraArgs:
    """Multiplies by minus the learning rate of the step."""

    def update(updates: Any, state: Any, params: Any = None, *, step: jax.Array, **_: Any) -> Any:
        rate = schedule(step)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _trust_ratio(axes: trees.Tree) -> optax.GradientTransformation:
    """Gives each matrix's direction the norm of the matrix; as it is where either norm is zero."""

    def rescale(update: jax.Array, param: jax.Array, axes: Sequence[str]) -> jax.Array:
        inside = Layout.of(axes).inside
        have, want = (
            jnp.sqrt(jnp.sum(jnp.square(x), axis=inside, keepdims=True)) for x in (update, param)
        )
        apply = (have > 0) & (want > 0)
        return update * jnp.where(apply, want / jnp.where(apply, have, 1), 1)

    return optax.stateless(lambda updates, params: jax.tree.map(rescale, updates, params, axes))


class FactorState(NamedTuple):
    """Adafactor's second moments. Reduced dimensions stay with size 1; of an unfactored leaf `rows`
    is the whole and `columns` a single zero."""

    count: jax.Array
    rows: Any
    columns: Any


def _scale_by_factors(config: Adafactor, axes: trees.Tree) -> optax.GradientTransformation:
    def over(leaf: jax.Array, axes: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The dimensions that `rows` and `columns` are averaged over."""
        layout = Layout.of(axes)
        short = min(_size(leaf, layout.rows), _size(leaf, layout.columns))
        if not layout.columns or short < config.factor_above:
            return (), tuple(range(leaf.ndim))
        return layout.columns, layout.rows

    def zeros(side: int) -> Callable[[jax.Array, Sequence[str]], jax.Array]:
        return lambda p, a: jnp.zeros(
            [1 if i in over(p, a)[side] else n for i, n in enumerate(p.shape)], jnp.float32
        )

    def init(params: Any) -> FactorState:
        return FactorState(
            jnp.zeros([], jnp.int32),
            jax.tree.map(zeros(0), params, axes),
            jax.tree.map(zeros(1), params, axes),
        )

    def update(updates: Any, state: FactorState, params: Any) -> tuple[Any, FactorState]:
        count = optax.safe_increment(state.count)
        keep = 1 - count.astype(jnp.float32) ** -config.exponent

        def leaf(g, rows, columns, p, axes):
            layout, (over_rows, over_columns) = Layout.of(axes), over(p, axes)
            square = jnp.square(g) + config.eps
            rows = keep * rows + (1 - keep) * jnp.mean(square, axis=over_rows, keepdims=True)
            if over_rows:
                columns = keep * columns + (1 - keep) * square.mean(over_columns, keepdims=True)
                mean = jnp.mean(rows, axis=layout.rows, keepdims=True)
                u = g * jax.lax.rsqrt(rows / mean) * jax.lax.rsqrt(columns)
            else:
                u = g * jax.lax.rsqrt(rows)
            u = u / jnp.maximum(1.0, _rms(u, layout.inside) / config.clip_update)
            if config.parameter_scale is not None:
                u = u * jnp.maximum(_rms(p, layout.inside), config.parameter_scale)
            return u, rows, columns

        updates, rows, columns = _map_split(
            leaf, 3, updates, state.rows, state.columns, params, axes
        )
        return updates, FactorState(count, rows, columns)

    return optax.GradientTransformation(init, update)


class MuonState(NamedTuple):
    """`mu` is the momentum of all leaves; `nu`, Adam's second moment, is a single zero for the
    matrices that have none."""

    count: jax.Array
    mu: Any
    nu: Any


def _scale_by_muon(config: Muon, axes: trees.Tree) -> optax.GradientTransformation:
    def init(params: Any) -> MuonState:
        def second(p: jax.Array, axes: Sequence[str]) -> jax.Array:
            return jnp.zeros([1] * p.ndim if is_hidden_matrix(axes) else p.shape, jnp.float32)

        first = jax.tree.map(lambda p: jnp.zeros(p.shape, config.moments), params)
        return MuonState(jnp.zeros([], jnp.int32), first, jax.tree.map(second, params, axes))

    def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        del params
        count = optax.safe_increment(state.count)
        # The bias correction of Adam; orthogonalising forgets the length, so Muon needs none.
        correct1, correct2 = 1 - config.b1**count, 1 - config.b2**count

        def leaf(g, mu, nu, axes):
            if is_hidden_matrix(axes):
                mu = config.momentum * mu.astype(jnp.float32) + g
                u = _orthogonal(config.momentum * mu + g, Layout.of(axes), config.rms)
            else:
                mu = config.b1 * mu.astype(jnp.float32) + (1 - config.b1) * g
                nu = config.b2 * nu + (1 - config.b2) * jnp.square(g)
                u = mu / correct1 / (jnp.sqrt(nu / correct2) + config.eps)
            return u, mu.astype(config.moments), nu

        updates, mu, nu = _map_split(leaf, 3, updates, state.mu, state.nu, axes)
        return updates, MuonState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _orthogonal(x: jax.Array, layout: Layout, rms: float) -> jax.Array:
    """The stack's matrices made orthogonal, each with root mean square `rms`."""
    rows, columns = _size(x, layout.rows), _size(x, layout.columns)
    # The stack's dimensions stay apart: flattening layers and experts into one would gather experts
    # spread over devices.
    matrix = x.reshape(*x.shape[: layout.batch], rows, columns)
    return (orthogonalise(matrix) * (rms * max(rows, columns) ** 0.5)).reshape(x.shape)


def orthogonalise(x: jax.Array) -> jax.Array:
    """U V^T, nearly, of the singular value decomposition U S V^T of each matrix [..., m, n];
    singular values end within about 0.7 and 1.2 (those that began below a thousandth of the norm
    may end lower). A zero matrix stays zero."""
    a, b, c = _NEWTON_SCHULZ
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + 1e-30)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def _size(x: jax.Array, dimensions: Sequence[int]) -> int:
    size = 1
    for i in dimensions:
        size *= x.shape[i]
    return size


def _rms(x: jax.Array, dimensions: Sequence[int]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=dimensions, keepdims=True))


def _map_split(function: Callable[..., tuple], count: int, tree: Any, *rest: Any) -> list[Any]:
    """Maps a function that returns `count` values over trees, and returns as many trees."""
    leaves, structure = jax.tree.flatten(tree)
    others = [structure.flatten_up_to(other) for other in rest]
    results = [function(*args) for args in zip(leaves, *others, strict=True)]
    return [structure.unflatten([result[i] for result in results]) for i in range(count)]
