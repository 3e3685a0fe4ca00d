"""Stochastic gradient descent."""

from dataclasses import dataclass

import optax

from lm import trees
from lm.errors import UserError
from lm.optim.optimizer import Optimizer, check_fields


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum, m = momentum * m + g. The direction is m, or with
    `nesterov` momentum * m + g. `moments` is the dtype of m."""

    momentum: float = 0.0
    nesterov: bool = False
    moments: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        if self.nesterov and not self.momentum:
            raise UserError(
                "optimizer.nesterov=True needs optimizer.momentum above zero, for example 0.9."
            )

    def direction(self, axes: trees.Tree) -> optax.GradientTransformation:
        if not self.momentum:
            return optax.identity()
        return optax.trace(self.momentum, self.nesterov, self.moments)
