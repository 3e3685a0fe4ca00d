"""AdamW."""

from dataclasses import dataclass

import optax

from lm import trees
from lm.optim.optimizer import Optimizer, check_fields


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101).

    `moments` is the dtype of the first moment. The second stays float32, since in bfloat16 a change
    by 1 - b2 rounds away.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    moments: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)

    def direction(self, axes: trees.Tree) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.moments)
