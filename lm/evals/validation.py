"""Loss and metrics of the experiment's own objective on held-out data, each with its standard
error: margin and accuracy of preference pairs, divergence from a teacher, and the like."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from lm.data import BatchShape, Prepared
from lm.data.batch import Batch
from lm.errors import UserError, check_positive
from lm.evals.evaluator import Context, Evaluator
from lm.evals.perplexity import HeldOut, place
from lm.evals.result import Result, ratio
from lm.model import Model
from lm.objectives import ExampleObjective, Frozen, Objective
from lm.parallel import sharding


@dataclass(frozen=True, kw_only=True)
class Validation(Evaluator):
    """The loss and metrics of the objective on held-out data, measured during training.

    source      the source whose held-out documents are used; None: those of every source in turn
    batches     most batches of each source; None: all
    sequences   sequences per batch; None: as many as in a training step
    """

    source: str | None = None
    batches: int | None = None
    sequences: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = {"evals.batches": self.batches, "evals.sequences": self.sequences}
        check_positive(**{name: value for name, value in limits.items() if value is not None})

    def evaluate(self, model: Model, context: Context) -> Sequence[Result]:
        return [
            result
            for name in self._names(context.data)
            for result in validate(
                model,
                context.objective,
                context.models,
                context.stored(
                    context.data.evaluation(
                        name, context.batch.length, self._per_batch(context.batch)
                    )
                ),
                step=context.step,
                batches=self.batches,
            )
        ]

    def sequences_read(self, prepared: Prepared, batch: BatchShape) -> dict[str, int]:
        """How many sequences of each source it reads, in the order of `Prepared.evaluation`."""
        most = sys.maxsize if self.batches is None else self.batches * self._per_batch(batch)
        return {
            name: min(most, len(prepared.evaluation(name, batch.length, 1)))
            for name in self._names(prepared)
        }

    def _names(self, prepared: Prepared) -> Sequence[str]:
        return prepared.held_out if self.source is None else (self.source,)

    def _per_batch(self, batch: BatchShape) -> int:
        return self.sequences or batch.sequences_at(0)

    def check(self, objective: Objective) -> None:
        """Raises UserError for an objective without examples."""
        if not isinstance(objective, ExampleObjective):
            raise UserError(
                f"evals: objective={type(objective).__name__} is no ExampleObjective, which "
                "Validation measures; use evals.Perplexity."
            )

    def sources(self) -> Sequence[str]:
        return () if self.source is None else (self.source,)


def validate(
    model: Model,
    objective: ExampleObjective,
    models: Frozen,
    documents: HeldOut,
    *,
    step: int | None = None,
    batches: int | None = None,
) -> list[Result]:
    """'NAME/loss' and 'NAME/METRIC' for each metric of the objective, means over the weight of its
    examples. The standard errors treat examples, such as pairs, as independent (see
    `result.ratio`). The count is the total weight: pairs, or tokens.

    Args:
        model: on a mesh, every process calls this with the same documents and gets the same
            results, while its devices read only their own rows.
        models: the frozen models that the objective asks for.
        step: number of updates of the weights, for the record.
        batches: most batches.

    Raises:
        UserError: without a single example.
    """
    queued = [
        _examples(model, models, place(batch, model.mesh), objective)
        for batch, _ in itertools.islice(documents, batches and min(batches, sys.maxsize))
    ]
    parts = jax.tree.map(np.asarray, queued)
    if not any((weight > 0).any() for weight, _ in parts):
        raise UserError(
            f"evaluation {documents.name!r} has no example for {type(objective).__name__}; is the "
            "file empty, or the held-out share too small?"
        )

    def of_examples(arrays: list[np.ndarray]) -> np.ndarray:
        pairs = zip(arrays, parts, strict=True)
        return np.concatenate([x[weight > 0] for x, (weight, _) in pairs]).astype(np.float64)

    weight_e = of_examples([weight for weight, _ in parts])
    results = []
    for name in sorted(parts[0][1], key=lambda name: name != "loss"):  # the loss first
        value, error = ratio(of_examples([values[name] for _, values in parts]), weight_e)
        results.append(
            Result(
                step=step,
                name=f"{documents.name}/{name}",
                value=value,
                stderr=error,
                count=round(weight_e.sum()),
            )
        )
    return results


@partial(jax.jit, static_argnames="objective")
def _examples(
    model: Model, models: Frozen, batch: Batch, objective: ExampleObjective
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(weight, {'loss' or metric: value}) of each example, replicated on a mesh."""
    with model.on_mesh():
        frozen = {name: frozen.cast() for name, frozen in models.items()}
        examples = objective.examples(model.cast(), batch, None, frozen)
    values = examples.weight, {"loss": examples.loss, **examples.metrics}
    if model.mesh is None:
        return values
    return jax.lax.with_sharding_constraint(values, sharding.replicated(model.mesh))
