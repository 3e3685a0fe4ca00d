"""Which part of a sequence lies where, so that under a causal mask all devices have as much to do.

The sequence is cut into twice as many halves as there are devices, and device c holds halves c and
2C-1-c: the one sees little, the other much (zig-zag, as in Llama 3, arXiv:2407.21783, 3.3.2).
"""

import jax
import jax.numpy as jnp
import numpy as np


def halves(device: jax.Array, devices: int) -> tuple[jax.Array, jax.Array]:
    """The numbers of the two halves on a device."""
    return device, 2 * devices - 1 - device


def placement(length: int, devices: int) -> np.ndarray:
    """The index in the sequence of each of the places 0..length-1, devices one after another."""
    half = length // (2 * devices)
    order = np.stack(halves(np.arange(devices), devices), axis=1).reshape(-1)
    return (order[:, None] * half + np.arange(half)).reshape(-1)


def in_order(x: jax.Array, axis_name: str) -> jax.Array:
    """A device's part [B, T, ...] of a sequence in its natural order, from its part of the placed
    one. Inside shard_map; each device sends both halves to where they belong."""
    devices = jax.lax.axis_size(axis_name)
    device = jax.lax.axis_index(axis_name)
    low, high = jnp.split(x, 2, axis=1)
    moved = []
    for odd in (0, 1):
        # Of a device's two halves one has an even number and the other an odd one.
        sent = jnp.where(device % 2 == odd, low, high)
        numbers = [c if c % 2 == odd else 2 * devices - 1 - c for c in range(devices)]
        ring = [(c, number // 2) for c, number in enumerate(numbers)]
        moved.append(jax.lax.ppermute(sent, axis_name, ring))
    return jnp.concatenate(moved, axis=1)
