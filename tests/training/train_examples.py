"""A model and batches that compile in a second or two."""

import numpy as np

from lm import model
from lm.data.batch import Batch

VOCAB = 61
DENSE = model.Config(
    vocab=VOCAB,
    dim=16,
    layers=2,
    attention=model.GQA(heads=4, kv_heads=2, head_dim=4),
    ffn=model.SwiGLU(hidden=32),
)


def batch(seed=0, rows=4, length=8, weights=None):
    """Random tokens. The last column is padding; label weights are uneven unless given."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCAB, (rows, length + 1), dtype=np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[:, -1] = 0
    if weights is None:
        weights = random.uniform(0, 2, (rows, length)) * (segments > 0)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Batch(
        tokens[:, :-1], tokens[:, 1:], np.asarray(weights, np.float32), segments, positions
    )
