"""Muon."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm import trees
from lm.errors import check_positive
from lm.optim.layout import Layout, is_hidden_matrix, size
from lm.optim.optimizer import Optimizer, check_fields, map_split

# Quintic Newton-Schulz iteration with a steep slope at zero, so that five iterations suffice
# (Jordan 2024, "Muon").
_NEWTON_SCHULZ, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Orthogonalized Nesterov momentum for hidden matrices, Adam for embedding, unembedding,
    routers and vectors (Jordan 2024).

    An orthogonal m x n matrix has root mean square 1/sqrt(max(m, n)). It is multiplied by rms *
    sqrt(max(m, n)); 0.2 is the root mean square of AdamW's steps, so that one learning rate and one
    weight decay serve both halves (Moonlight, arXiv:2502.16982).

    Args:
      momentum, rms: of the hidden matrices.
      b1, b2, eps: of Adam.
      moments: dtype of the momentum and of Adam's first moment.
    """

    momentum: float = 0.95
    rms: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    moments: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        check_positive(**{"optimizer.rms": self.rms})

    def direction(self, axes: trees.Tree) -> optax.GradientTransformation:
        return _scale_by_muon(self, axes)


class MuonState(NamedTuple):
    """`mu` is the momentum of all parameters; `nu`, Adam's second moment, is a single zero for the
    hidden matrices, which need none."""

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
        # Adam's bias correction. Muon needs none: orthogonalizing discards the momentum's norm.
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

        updates, mu, nu = map_split(leaf, 3, updates, state.mu, state.nu, axes)
        return updates, MuonState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _orthogonal(x: jax.Array, layout: Layout, rms: float) -> jax.Array:
    """Orthogonalizes each matrix of the stack and gives it the root mean square `rms`."""
    rows, columns = size(x.shape, layout.rows), size(x.shape, layout.columns)
    # Keep the stack's dimensions apart: flattening layers and experts into one dimension would
    # gather experts that are sharded over devices.
    matrix = x.reshape(*x.shape[: layout.batch], rows, columns)
    return (orthogonalize(matrix) * (rms * max(rows, columns) ** 0.5)).reshape(x.shape)


def orthogonalize(x: jax.Array) -> jax.Array:
    """Approximates U V^T of the singular value decomposition U S V^T of each matrix [..., m, n].

    Singular values end between about 0.7 and 1.2; those that began below a thousandth of the norm
    may end lower. A zero matrix stays zero.
    """
    a, b, c = _NEWTON_SCHULZ
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + 1e-30)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT
