"""Adafactor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm import trees
from lm.errors import check_positive
from lm.optim.layout import Layout, size
from lm.optim.optimizer import Optimizer, check_fields, map_split


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Second moments factored into row and column means (Shazeer & Stern, arXiv:1804.04235),
    without momentum.

    Args:
      exponent: the decay of the second moment at update t is 1 - t**-exponent.
      clip_update: bound on the root mean square of one matrix's direction.
      parameter_scale: scales each direction by its parameter's root mean square, clamped from below
        to this value (1e-3 in the paper); None does not scale.
      factor_above: factors a matrix whose sides both have at least this length.
    """

    exponent: float = 0.8
    clip_update: float = 1.0
    parameter_scale: float | None = None
    factor_above: int = 128
    eps: float = 1e-30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        check_positive(
            **{
                "optimizer.exponent": self.exponent,
                "optimizer.clip_update": self.clip_update,
                "optimizer.factor_above": self.factor_above,
            }
        )

    def direction(self, axes: trees.Tree) -> optax.GradientTransformation:
        return _scale_by_factors(self, axes)


class FactorState(NamedTuple):
    """Second moments. Reduced dimensions keep size 1. For an unfactored parameter `rows` is the
    whole second moment and `columns` a single zero."""

    count: jax.Array
    rows: Any
    columns: Any


def _scale_by_factors(config: Adafactor, axes: trees.Tree) -> optax.GradientTransformation:
    def over(leaf: jax.Array, axes: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The dimensions that `rows` and `columns` are averaged over."""
        layout = Layout.of(axes)
        short = min(size(leaf.shape, layout.rows), size(leaf.shape, layout.columns))
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

        updates, rows, columns = map_split(
            leaf, 3, updates, state.rows, state.columns, params, axes
        )
        return updates, FactorState(count, rows, columns)

    return optax.GradientTransformation(init, update)


def _rms(x: jax.Array, dimensions: Sequence[int]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=dimensions, keepdims=True))
