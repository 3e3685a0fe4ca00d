"""Evaluations of a model.

evaluator    the base class `Evaluator`
perplexity   loss, perplexity and bits per byte of text
validation   loss and metrics of the objective: margin and accuracy of pairs, and the like
result       a number with its standard error
compression  bits per byte of `xz -9`, for comparison
"""

from lm.evals.compression import xz_bits_per_byte
from lm.evals.evaluator import Context, Evaluator
from lm.evals.perplexity import HeldOut, Perplexity, perplexity
from lm.evals.result import Result, ratio
from lm.evals.validation import Validation, validate

__all__ = [
    "Context",
    "Evaluator",
    "HeldOut",
    "Perplexity",
    "Result",
    "Validation",
    "perplexity",
    "ratio",
    "validate",
    "xz_bits_per_byte",
]
