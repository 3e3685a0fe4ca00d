"""Small models with any kind of attention."""

import jax

from lm import model

VOCAB = 64


def config(**changes) -> model.Config:
    fields = {
        "vocab": VOCAB,
        "dim": 32,
        "layers": 2,
        "attention": model.GQA(heads=4, kv_heads=2, head_dim=8),
        "ffn": model.SwiGLU(hidden=48),
        "embed_std": 1.0,
    }
    return model.Config(**{**fields, **changes})


def parameters(config: model.Config, seed: int = 0):
    return jax.jit(model.init, static_argnums=0)(config, jax.random.key(seed))
