"""What every evaluation during training has in common."""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from lm.data import BatchShape, Prepared
from lm.errors import check_positive
from lm.evals.result import Result
from lm.model import Model
from lm.objectives import Frozen, NextToken, Objective


class Context(NamedTuple):
    """What an evaluation may use besides the model.

    step       number of updates of the model's weights
    data       the experiment's text: tokenizer, held-out documents
    batch      sequences per training step and their length
    objective  of training
    models     the frozen models that the objective asks for; none if it stores their numbers
    stored     adds the stored fields of the objective to the batches of held-out documents
    """

    step: int
    data: Prepared
    batch: BatchShape
    objective: Objective = NextToken()
    models: Frozen = MappingProxyType({})
    stored: Callable[[Any], Any] = lambda documents: documents


@dataclass(frozen=True, kw_only=True)
class Evaluator(abc.ABC):
    """An evaluation during training. Subclass it as a frozen dataclass to add your own.

        @dataclass(frozen=True, kw_only=True)
        class Greedy(Evaluator):
            prompt: str = "def "

            def evaluate(self, model, context):
                engine = generate.Engine(model.cast(), context=context.batch.length)
                tokenizer = context.data.tokenizer
                texts = generate.generate_text(engine, tokenizer, [self.prompt], max_tokens=9)
                return [Result(step=context.step, name="greedy/length", ...)]

    every  steps between two evaluations; there is always one after the last step
    """

    every: int = 1_000

    def __post_init__(self) -> None:
        check_positive(**{"evals.every": self.every})

    @abc.abstractmethod
    def evaluate(self, model: Model, context: Context) -> Sequence[Result]:
        """Results of the model. Every process calls it, and returns the same results."""

    def sources(self) -> Sequence[str]:
        """Names of the data sources that it reads, to be checked before training."""
        return ()
