"""The result of an evaluation: a number with its standard error."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of eval.jsonl.

    step     number of updates of the weights; None if they were not trained here
    name     'source/measure', such as 'web:held_out/bits_per_byte'
    value    the estimate
    stderr   its standard error; None for a single observation
    count    sample size: tokens of a text, questions of a task
    """

    step: int | None
    name: str
    value: float
    stderr: float | None
    count: int


def ratio(y_c: np.ndarray, x_c: np.ndarray) -> tuple[float, float | None]:
    """sum(y) / sum(x) over clusters c and its standard error, None for fewer than two clusters.

    Tokens of one document are correlated; documents are treated as independent. This is the ratio
    estimator with documents as units (Cochran, Sampling Techniques, 3rd ed. 1977, ch. 6; clustered
    errors in evaluations of language models: Miller, arXiv:2411.00640). By the delta method, with C
    clusters and without a correction for finite populations,

        R = sum(y) / sum(x)
        stderr(R)^2 = C / (C - 1) * sum((y_c - R x_c)^2) / sum(x)^2
    """
    y_c, x_c = np.asarray(y_c, np.float64), np.asarray(x_c, np.float64)
    clusters, total = len(x_c), x_c.sum()
    value = y_c.sum() / total
    if clusters < 2:
        return float(value), None
    residual = np.sum(np.square(y_c - value * x_c)) * clusters / (clusters - 1)
    return float(value), float(np.sqrt(residual) / total)
