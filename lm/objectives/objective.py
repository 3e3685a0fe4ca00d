"""What every objective has in common."""

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.model import Model


class Loss(NamedTuple):
    """Sums over a batch in float32, never means: the step adds them over micro-batches and devices
    and divides once by the weight.

    total       scalar, what is minimized, times the weight; without auxiliary losses
    weight      scalar, sum of the weights of the targets
    metrics     name -> scalar, each times the weight
    statistics  of the forward pass (`lm.model.Output.statistics`), from which the step computes the
                auxiliary losses of the whole batch. Leave it out to train without them
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array] = {}  # noqa: RUF012
    statistics: dict[str, Any] = {}  # noqa: RUF012


@dataclass(frozen=True, kw_only=True)
class Objective(abc.ABC):
    """What training minimizes. Subclass it as a frozen dataclass to add your own.

    @dataclass(frozen=True, kw_only=True)
    class LabelSmoothing(Objective):
        amount: float = 0.1

        def loss(self, apply, batch, key, frozen):
            logits_btv = apply.logits(apply(batch.tokens, segments_bt=batch.segments).hidden_btd)
            ...
            return Loss(total=jnp.sum(loss_bt * batch.weights), weight=jnp.sum(batch.weights))
    """

    @abc.abstractmethod
    def loss(self, apply: Model, batch: Any, key: jax.Array | None, frozen: Any) -> Loss:
        """The loss of a batch.

        Args:
          apply: the model in training, bound to its mesh, remat and pipeline options.
          batch: a NamedTuple of arrays with a leading batch axis.
          key: a jax.random.key for dropout and sampling, different in each step and micro-batch;
            None in evaluation.
          frozen: the weights that do not train, as a nested dict; {} if all train.
        """

    def tokens(self, batch: Any) -> jax.Array:
        """Number of tokens in a batch, without padding, for the metrics."""
        if hasattr(batch, "segments"):
            return jnp.sum(batch.segments > 0)
        return jnp.int32(max(x.size for x in jax.tree.leaves(batch)))
