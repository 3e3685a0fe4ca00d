"""What every objective has in common."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.packing import Packing
from lm.errors import UserError
from lm.model import Config, Model

START = "start"  # in `Objective.models`: the weights that training starts from

Frozen = Mapping[str, Model]  # name -> a model that does not train


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


class Examples(NamedTuple):
    """The parts of a loss, one for each example of a batch: a pair, or a document. Arrays are of
    one shape, in float32, and zero where there is no example.

    loss        the example's share of `Loss.total`
    weight      its share of `Loss.weight`
    metrics     its shares of `Loss.metrics`
    statistics  as in `Loss`
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array] = {}  # noqa: RUF012
    statistics: dict[str, Any] = {}  # noqa: RUF012

    def sum(self) -> Loss:
        """Of all examples."""
        metrics = {name: jnp.sum(value) for name, value in self.metrics.items()}
        return Loss(jnp.sum(self.loss), jnp.sum(self.weight), metrics, self.statistics)


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

    head: ClassVar[str] = "vocab"  # the model.head that it needs
    paired: ClassVar[bool] = False  # whether it needs batches of pairs

    @abc.abstractmethod
    def loss(self, apply: Model, batch: Any, key: jax.Array | None, frozen: Frozen) -> Loss:
        """The loss of a batch.

        Args:
          apply: the model in training, bound to its mesh, remat and pipeline options.
          batch: a NamedTuple of arrays with a leading batch axis.
          key: a jax.random.key for dropout and sampling, different in each step and micro-batch;
            None in evaluation.
          frozen: the models that `models` asks for, by name. They get no gradient. Empty if the
            objective stores their numbers instead.
        """

    def models(self) -> dict[str, str]:
        """Frozen models that the loss needs besides the one in training: name -> a run folder, a
        Hugging Face folder, or START for the weights that training starts from."""
        return {}

    def stored_fields(self) -> dict[str, np.dtype]:
        """Numbers of these models to compute for each sequence before the first update, instead of
        in each step: name -> format of a token, as in np.dtype(("f4", (8,))) for 8 of them. They
        are fields [B, T, ...] of the batches, and the models are not in memory in training."""
        return {}

    def precompute(self, config: Config, batch: Any, frozen: Frozen) -> dict[str, jax.Array]:
        """The stored fields of a batch, for a model of this config in training."""
        return {}

    def loss_models(self) -> dict[str, str]:
        """The models that `loss` receives: all of `models`, or none if their numbers are stored."""
        return {} if self.stored_fields() else self.models()

    def check(self, config: Config, packing: Packing) -> None:
        """Raises UserError for a model or a packing of batches that it cannot train with."""
        name = type(self).__name__
        if config.head != self.head:
            raise UserError(
                f"objective={name} needs model.head={self.head!r}, and it is {config.head!r}."
            )
        if self.paired and not packing.paired:
            raise UserError(
                f"objective={name} needs pairs of documents, and batch.packing="
                f"{type(packing).__name__} keeps none together; set batch.packing=data.Pairs()."
            )

    def tokens(self, batch: Any) -> jax.Array:
        """Number of tokens in a batch, without padding, for the metrics."""
        if hasattr(batch, "segments"):
            return jnp.sum(batch.segments > 0)
        return jnp.int32(max(x.size for x in jax.tree.leaves(batch)))


@dataclass(frozen=True, kw_only=True)
class ExampleObjective(Objective):
    """Base class of objectives whose loss is a sum over examples, such as pairs.
    `lm.evals.Validation` measures it on held-out data, with standard errors."""

    @abc.abstractmethod
    def examples(self, apply: Model, batch: Any, key: jax.Array | None, frozen: Frozen) -> Examples:
        """The loss and metrics of each example of a batch; arguments as in `loss`."""

    def loss(self, apply: Model, batch: Any, key: jax.Array | None, frozen: Frozen) -> Loss:
        return self.examples(apply, batch, key, frozen).sum()
