"""LAMB."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from lm import trees
from lm.optim.layout import Layout
from lm.optim.optimizer import Optimizer, check_fields


@dataclass(frozen=True, kw_only=True)
class LAMB(Optimizer):
    """Adam whose step on each matrix is scaled to that matrix's norm (You et al.,
    arXiv:1904.00962), for large batches."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    moments: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)

    def direction(self, axes: trees.Tree) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.moments)

    def rescale(self, axes: trees.Tree) -> list[optax.GradientTransformation]:
        return [_trust_ratio(axes)]


def _trust_ratio(axes: trees.Tree) -> optax.GradientTransformation:
    """Scales each matrix's direction to the norm of the matrix; unchanged where either norm is
    zero."""

    def rescale(update: jax.Array, param: jax.Array, axes: Sequence[str]) -> jax.Array:
        inside = Layout.of(axes).inside
        update_norm, param_norm = (
            jnp.sqrt(jnp.sum(jnp.square(x), axis=inside, keepdims=True)) for x in (update, param)
        )
        apply = (update_norm > 0) & (param_norm > 0)
        return update * jnp.where(apply, param_norm / jnp.where(apply, update_norm, 1), 1)

    return optax.stateless(lambda updates, params: jax.tree.map(rescale, updates, params, axes))
