"""Fixtures: a small config, and weights that depend only on the layer number and the name of the
weight, so that the weights that two configs have in common are equal."""

import dataclasses
import functools
import math
import zlib

import jax
import numpy as np
import pytest

from lm import model, trees

VOCAB, DIM, HEAD = 40, 16, 8


@pytest.fixture(scope="session")
def base() -> model.Config:
    return model.Config(
        vocab=VOCAB,
        dim=DIM,
        layers=2,
        attention=model.GQA(heads=4, kv_heads=2, head_dim=HEAD),
        ffn=model.SwiGLU(hidden=24),
    )


@pytest.fixture(scope="session")
def attend(base):
    """Returns a function: attention options -> the small config with these options."""
    return lambda **options: dataclasses.replace(
        base, attention=dataclasses.replace(base.attention, **options)
    )


@pytest.fixture(scope="session")
def draw():
    """Returns a function: config -> random weights, large enough that every option has a visible
    effect. Matrices preserve the variance of their input; norm scales and biases are around one."""

    def weight(number: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = np.random.default_rng([zlib.crc32(name.encode()), number]).standard_normal(shape)
        if name.endswith(("norm/scale", "bias")):
            return 1 + 0.2 * noise
        fan_in = shape[0] if len(shape) == 2 or not name.endswith("/o") else shape[0] * shape[1]
        return noise if name == "embed/table" else noise / math.sqrt(fan_in)

    def params(config: model.Config) -> dict:
        layout, flat = config.layout, {}
        first = {"prefix": 0, "blocks": len(layout.prefix)}
        first["suffix"] = config.layers - len(layout.suffix)
        for path, shape in trees.flatten(model.shapes(config)).items():
            part, i, *name = path.split("/")
            if part not in first:
                flat[path] = weight(0, path, shape.shape)
                continue
            number, name = first[part] + int(i), "/".join(name)
            if part != "blocks":
                flat[path] = weight(number, name, shape.shape)
                continue
            step, (repeats, *rest) = len(layout.pattern), shape.shape
            flat[path] = np.stack(
                [weight(number + r * step, name, tuple(rest)) for r in range(repeats)]
            )
        return trees.unflatten({path: w.astype(np.float32) for path, w in flat.items()})

    return params


@pytest.fixture(scope="session")
def run(draw):
    """Returns a function: (config, tokens, params=None, **options of forward) -> float32 logits.
    Compiles once per config."""

    @functools.cache
    def compiled(config: model.Config):
        def logits(params, tokens, options):
            out = model.Model(config, params)(tokens, **options)
            return model.Model(config, params).logits(out.hidden_btd)

        return jax.jit(logits)

    def call(config: model.Config, tokens, params=None, **options) -> np.ndarray:
        params = draw(config) if params is None else params
        return np.asarray(compiled(config)(params, tokens, options))

    return call


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """Shape [2, 12], without repeated tokens, so that each row of the embedding's gradient belongs
    to one position."""
    return np.random.default_rng(0).permutation(VOCAB)[:24].reshape(2, 12).astype(np.int32)
