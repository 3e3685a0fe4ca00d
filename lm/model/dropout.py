"""Dropout (Srivastava et al. 2014), and the keys of dropout inside a layer's products."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


# [the key of the layer that is traced, the number of keys taken from it]
_layer: contextvars.ContextVar[list | None] = contextvars.ContextVar("dropout_key", default=None)


@contextlib.contextmanager
def layer_key(key: jax.Array | None) -> Iterator[None]:
    """Context in which `next_key` gives keys of this layer; None turns dropout off."""
    token = _layer.set(None if key is None else [key, 0])
    try:
        yield
    finally:
        _layer.reset(token)


def next_key() -> jax.Array | None:
    """A key for the next dropout inside the layer that is traced; None where dropout is off."""
    layer = _layer.get()
    if layer is None:
        return None
    layer[1] += 1
    return jax.random.fold_in(*layer)
