"""A trained model is measured: numbers with their standard errors."""

from lm.evals.perplexity import Evaluation, Perplexity, evaluate
from lm.evals.result import Result, ratio

__all__ = ["Evaluation", "Perplexity", "Result", "evaluate", "ratio"]
