"""Batch: the interface between the data pipeline and training, evaluation and objectives."""

import collections
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray


class Batch(NamedTuple):
    """B sequences of T tokens for next-token prediction; every array is [B, T].

    tokens     int32, model inputs
    targets    int32, the token after each input token
    weights    float32, loss weight of each target; 0 on padding
    segments   int32, document number within the sequence, from 1; 0 on padding. Attention stays
               within a segment
    positions  int32, position within the segment, from 0
    """

    tokens: Array
    targets: Array
    weights: Array
    segments: Array
    positions: Array


def extend(batch: Any, fields: Mapping[str, Array]) -> Any:
    """The batch with more fields, which are [B, T, ...]."""
    return batch_type((*batch._fields, *fields))(*batch, *fields.values())


@functools.cache
def batch_type(names: tuple[str, ...]) -> Any:
    """The type of batches with these fields."""
    return Batch if names == Batch._fields else collections.namedtuple("Batch", names)
