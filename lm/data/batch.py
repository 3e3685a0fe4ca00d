"""The contract between data and everything after it."""

from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray


class Batch(NamedTuple):
    """B sequences of T tokens; all arrays are [B, T].

    tokens     int32, what the model reads
    targets    int32, what follows each token in its document
    weights    float32, how much each target counts in the loss: 0 on padding
    segments   int32, the document within the sequence, from 1, which attention never leaves; 0 is
               padding
    positions  int32, the place within the document, from 0 at each segment's start
    """

    tokens: Array
    targets: Array
    weights: Array
    segments: Array
    positions: Array
