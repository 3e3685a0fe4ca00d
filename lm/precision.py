"""Mixed precision: the dtypes of storage and of arithmetic. All casts of weights are here; norms,
softmax and losses compute in float32 in any case."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lm import trees
from lm.errors import UserError, check_name, check_positive

STORAGE = ("float32", "bfloat16")
COMPUTE = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """Dynamic loss scaling (Micikevicius et al., arXiv:1710.03740). The scale is doubled after
    `growth_interval` finite steps in a row; if a gradient is not finite, it is halved and the step
    is skipped."""

    initial: float = 2.0**15
    growth_interval: int = 2_000

    def __post_init__(self) -> None:
        check_positive(
            **{
                "precision.loss_scale.initial": self.initial,
                "precision.loss_scale.growth_interval": self.growth_interval,
            }
        )


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtypes of a run: `params` for storage of the weights, `compute` for the forward and
    backward pass.

    Gradients are accumulated, and the optimizer state is stored, in float32 (see `moments` of each
    optimizer). Weights in bfloat16 save memory and lose updates smaller than 1/256 of a weight.
    float16 arithmetic needs a `loss_scale`, because gradients can be below its smallest normal
    number, 6e-5; nothing is stored in float16.
    """

    params: str = "float32"
    compute: str = "float32"
    loss_scale: LossScale | None = None

    def __post_init__(self) -> None:
        check_name("precision.params", self.params, STORAGE)
        check_name("precision.compute", self.compute, COMPUTE)
        if self.compute == "float16" and self.loss_scale is None:
            raise UserError(
                "precision.compute='float16' needs precision.loss_scale=LossScale(); "
                "or use 'bfloat16'."
            )
        if self.compute != "float16" and self.loss_scale is not None:
            raise UserError(
                "precision.loss_scale has no use with "
                f"precision.compute={self.compute!r}; leave it out."
            )

    def to_compute(self, params: Any) -> Any:
        """Floating leaves cast to `compute`; the rest unchanged."""
        return cast(params, self.compute)

    def to_params(self, params: Any) -> Any:
        """Floating leaves cast to `params`; the rest unchanged."""
        return cast(params, self.params)


# bfloat16 arithmetic with float32 weights: usual on TPUs and recent GPUs.
BF16 = Precision(compute="bfloat16")
FP16 = Precision(compute="float16", loss_scale=LossScale())


def cast(tree: Any, dtype: str) -> Any:
    """Floating leaves in `dtype`; the rest unchanged. A `trees.Leaf` casts itself."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        tree,
        is_leaf=trees.is_leaf,
    )
