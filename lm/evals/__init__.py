"""A trained model is measured: numbers with their standard errors."""

from lm.evals.compression import xz_bits_per_byte
from lm.evals.perplexity import Perplexity, evaluate
from lm.evals.result import Result, ratio

__all__ = ["Perplexity", "Result", "evaluate", "ratio", "xz_bits_per_byte"]
