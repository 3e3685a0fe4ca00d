"""Documents (prompt, completion) packed into batches, and a small model to apply to them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import model
from lm.data.batch import Batch

VOCAB = 61
CONFIG = model.Config(
    vocab=VOCAB,
    dim=16,
    layers=2,
    attention=model.GQA(heads=8, kv_heads=2, head_dim=4),
    ffn=model.SwiGLU(hidden=32),
    init=model.Normal(std=0.3),
    embed_std=0.5,
)


class Document(NamedTuple):
    """Tokens of a prompt, which begins with the begin token, and of its completion."""

    prompt: np.ndarray
    completion: np.ndarray
    weight: int = 1

    @property
    def tokens(self) -> np.ndarray:
        return np.concatenate([self.prompt, self.completion])


def documents(count: int, seed: int = 0, vocab: int = VOCAB) -> list[Document]:
    """Two documents with the same prompt, one pair after another."""
    random = np.random.default_rng(seed)

    def tokens(most: int) -> np.ndarray:
        return random.integers(0, vocab, random.integers(1, most + 1))

    prompts = [tokens(4) for _ in range(count // 2)]
    return [Document(prompt, tokens(6)) for prompt in prompts for _ in range(2)]


def pack(rows: list[list[Document]], length: int) -> Batch:
    """A batch with these documents in each row, and padding after them."""
    shape = len(rows), length
    tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        at = 0
        for segment, document in enumerate(row, start=1):
            ids, first = document.tokens, len(document.prompt) - 1
            place = b, slice(at, at := at + len(ids) - 1)
            tokens[place], targets[place] = ids[:-1], ids[1:]
            segments[place], positions[place] = segment, np.arange(len(ids) - 1)
            weights[place] = np.where(np.arange(len(ids) - 1) >= first, document.weight, 0)
    return Batch(tokens, targets, weights, segments, positions)


def in_rows(docs: list[Document], per_row: int) -> list[list[Document]]:
    return [docs[i : i + per_row] for i in range(0, len(docs), per_row)]


def init(seed: int, config: model.Config = CONFIG) -> dict:
    return jax.jit(model.init, static_argnums=0)(config, jax.random.key(seed))


@jax.jit
def _logits(params: dict, tokens_bt: jax.Array) -> jax.Array:
    apply = model.Model(CONFIG, params)
    return apply.logits(apply(tokens_bt).hidden_btd)


def log_probabilities(params: dict, document: Document, length: int = 16) -> np.ndarray:
    """Of each token of the completion, in float64 from all logits of the document alone."""
    ids = document.tokens
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(ids) - 1] = ids[:-1]
    z_tv = np.asarray(_logits(params, jnp.asarray(padded)), np.float64)[0, : len(ids) - 1]
    logp_tv = z_tv - np.log(np.sum(np.exp(z_tv), axis=-1, keepdims=True))
    return logp_tv[np.arange(len(logp_tv)), ids[1:]][-len(document.completion) :]
