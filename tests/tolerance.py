"""Tolerances for comparing floating-point sums, derived from the arithmetic.

Processors with vectors of another width, thread pools and other block sizes add the terms of a sum
in another order, so that the results of two correct programs differ by roundings. A literal
tolerance measured on one machine may fail on another.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np


def unit_roundoff(dtype: Any) -> float:
    """u, the largest relative error of rounding to `dtype`: 2**-24 for float32, 2**-8 for
    bfloat16."""
    return float(jnp.finfo(dtype).eps) / 2


def largest(x: Any) -> float:
    """Largest magnitude in an array, or of a number."""
    return float(np.max(np.abs(np.asarray(x, np.float64)), initial=0.0))


def of_sum(terms: int, *factors: Any, inherited: float = 0.0, dtype: Any = jnp.float32) -> float:
    """Absolute tolerance between two evaluations of a sum of `terms` products.

    With n terms of magnitude at most M, an evaluation in any order errs by at most n * u times the
    sum of magnitudes, n**2 * u * M (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
    section 4.2). That needs terms of one sign and roundings that all go one way. Terms of either
    sign keep partial sums near sqrt(n) * M, and roundings of either sign add up to sqrt(n) of
    them, which gives n * u * M. This function returns 2 * n * u * M, for two evaluations. M is the
    product of the largest factors; for normal random numbers it is 10 to 20 times a typical term,
    which also covers hundreds of terms of one sign. For weighted means (factors at most 1 that add
    up to 1) it is above the worst case.

    Args:
      terms: n, the number of terms.
      factors: the factors of a term: arrays, whose largest magnitude counts, or numbers.
      inherited: tolerance of each single term, where factors are themselves results of sums.
      dtype: dtype of the sum.
    """
    magnitude = math.prod(largest(factor) for factor in factors)
    return terms * (2 * unit_roundoff(dtype) * magnitude + inherited)


def of_chain(result: Any, *sums: float, roundings: float = 0, dtype: Any = jnp.float32) -> float:
    """Absolute tolerance of a result behind several float32 sums, such as attention.

    Worst-case bounds multiply along a chain of sums and end far above real errors. Roundings of
    either sign in a sum of n numbers add up to about sqrt(n) * u relative to the largest result,
    and errors pass on in proportion: 2 * u * (1 + sum of sqrt(n)), for two evaluations.

    Args:
      result: array; the tolerance is relative to its largest magnitude.
      sums: numbers of terms of the sums, one after another. An exponential amplifies the error of
        its argument by the argument: count a sum of n terms in a score of size s as n * s**2.
      roundings: number of roundings of intermediate results and of the result to `dtype`.
      dtype: dtype of the roundings.
    """
    of_sums = 2 * unit_roundoff(jnp.float32) * (1 + sum(math.sqrt(n) for n in sums))
    return largest(result) * (of_sums + roundings * unit_roundoff(dtype))
