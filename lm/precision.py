"""Number formats of a run. These are the only casts of parameters; norms, softmax and losses
reduce in float32 by themselves."""

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
    """Dynamic loss scaling (Micikevicius et al., arXiv:1710.03740): doubled after `growth_interval`
    finite steps in a row, halved, and the step skipped, when a gradient is not finite."""

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
    """Storage of the parameters, and arithmetic of the forward and backward pass.

    Gradients are summed, and the optimizer's state is kept, in float32 (see each optimizer's
    `moments`). Parameters in bfloat16 save memory and lose updates smaller than 1/256 of a weight.
    float16 arithmetic needs a `loss_scale`, since its smallest normal number is 6e-5 and gradients
    go below it; nothing is stored in it.
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
        """Floating leaves in the arithmetic format; the rest as they are."""
        return cast(params, self.compute)

    def to_params(self, params: Any) -> Any:
        """Floating leaves in the storage format; the rest as they are."""
        return cast(params, self.params)


# bf16 arithmetic over f32 parameters: the default on TPUs and recent GPUs.
BF16 = Precision(compute="bfloat16")
FP16 = Precision(compute="float16", loss_scale=LossScale())


def cast(tree: Any, dtype: str) -> Any:
    """Floating leaves in `dtype`; the rest unchanged. A `trees.Leaf` casts itself."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        tree,
        is_leaf=trees.is_leaf,
    )
