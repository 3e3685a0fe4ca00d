"""The base class of optimizers: a dataclass whose `build` returns an optax transformation, which is
direction, weight decay and learning rate in a chain.

Stacked layers and experts are separate matrices to every optimizer of this package: training a
stack equals training its layers one by one. A parameter whose gradient is zero and which does not
decay (a router's balancing bias) is never moved.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from lm import trees
from lm.errors import UserError, check_name, check_not_negative, check_positive
from lm.optim.layout import decays

ScheduleFunction = Callable[[jax.Array], jax.Array]  # step -> learning rate


@dataclass(frozen=True, kw_only=True)
class Optimizer(abc.ABC):
    """Base class of optimizers. A subclass returns any optax transformation from `direction`::

        @dataclass(frozen=True, kw_only=True)
        class Adan(optim.Optimizer):
            b1: float = 0.98

            def direction(self, axes):
                return optax.scale_by_adan(self.b1)

    `build` adds decoupled weight decay and the learning rate:
    w -= learning_rate * (direction + weight_decay * w).

    Args:
      weight_decay: decay of matrices, not of norms and biases (see `lm.optim.layout.decays`).
      decay_embedding: whether the embedding decays too.
      clip_norm: bound on the global norm of the gradient; None: no bound. The training step clips,
        where it computes that norm for the metrics: the gradient averaged over all micro-batches.
    """

    weight_decay: float = 0.0
    decay_embedding: bool = True
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        check_not_negative(**{"optimizer.weight_decay": self.weight_decay})
        if self.clip_norm is not None:
            check_positive(**{"optimizer.clip_norm": self.clip_norm})

    @abc.abstractmethod
    def direction(self, axes: trees.Tree) -> optax.GradientTransformation:
        """The transformation of gradients into a direction, without weight decay and learning rate.

        The direction has the gradient's sign: `optax.scale_by_*` fits; a whole optimizer such as
        `optax.adam(1.0)` descends by itself and needs `optax.chain(..., optax.scale(-1.0))`.

        Args:
          axes: the parameters' logical axes, a nested dict of tuples.

        `update` gets float32 gradients, parameters, and the keyword `step`. State that mirrors the
        parameters (an array of a parameter's rank at its path) is sharded as they are; the rest is
        replicated.
        """

    def rescale(self, axes: trees.Tree) -> list[optax.GradientTransformation]:
        """Transformations between weight decay and learning rate; none by default."""
        del axes
        return []

    def build(
        self, schedule: ScheduleFunction, axes: trees.Tree
    ) -> optax.GradientTransformationExtraArgs:
        """The whole transformation: direction, weight decay, `rescale`, learning rate.

        `update(gradients, state, params, step=step)` returns what to add to the parameters. The
        learning rate is schedule(step) of that step, so a skipped update does not delay the
        schedule.

        Args:
          schedule: learning rate as a function of the step (int32 scalar).
          axes: the parameters' logical axes, a nested dict of tuples.
        """
        mask = trees.map_with_path(lambda _, a: decays(a, self.decay_embedding), axes)
        links = [self.direction(axes), _decay(self.weight_decay, mask), *self.rescale(axes)]
        return optax.with_extra_args_support(optax.chain(*links, _descend(schedule)))


def check_fields(optimizer: Optimizer) -> None:
    """Raises UserError unless the fields b1, b2, momentum, eps and moments, where they exist, are
    in range."""
    for name in ("b1", "b2", "momentum"):
        if not 0 <= np.float32(getattr(optimizer, name, 0)) < 1:
            raise UserError(
                f"optimizer.{name}={getattr(optimizer, name)!r} must be at least 0 and below 1."
            )
    if hasattr(optimizer, "eps"):
        check_positive(**{"optimizer.eps": optimizer.eps})
    if hasattr(optimizer, "moments"):
        check_name("optimizer.moments", optimizer.moments, ("float32", "bfloat16"))


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


def map_split(function: Callable[..., tuple], count: int, tree: Any, *rest: Any) -> list[Any]:
    """Maps a function that returns `count` values over trees, and returns `count` trees."""
    leaves, structure = jax.tree.flatten(tree)
    others = [structure.flatten_up_to(other) for other in rest]
    results = [function(*args) for args in zip(leaves, *others, strict=True)]
    return [structure.unflatten([result[i] for result in results]) for i in range(count)]
