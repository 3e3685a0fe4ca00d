"""Lion."""

from dataclasses import dataclass

import optax

from lm import trees
from lm.optim.optimizer import Optimizer, check_fields


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """The sign of interpolated momentum (Chen et al., arXiv:2302.06675). Needs a learning rate 3 to
    10 times below AdamW's and a weight decay as much above."""

    b1: float = 0.9
    b2: float = 0.99
    moments: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)

    def direction(self, axes: trees.Tree) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2, mu_dtype=self.moments)
