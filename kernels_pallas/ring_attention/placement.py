"""Zig-zag placement of a sequence on devices, which balances the work of causal attention.

The sequence is split into 2C chunks for C devices; device c holds chunks c and 2C-1-c, of which one
sees few keys and the other many (Llama 3, arXiv:2407.21783, 3.3.2). The code calls the two chunks
of a device its halves.
"""

import jax
import jax.numpy as jnp
import numpy as np


def halves(device: jax.Array, devices: int) -> tuple[jax.Array, jax.Array]:
    """Chunk numbers of the two halves of a device."""
    return device, 2 * devices - 1 - device


def placement(length: int, devices: int) -> np.ndarray:
    """Permutation [length]: sequence index of each token in placed order, device by device."""
    half = length // (2 * devices)
    order = np.stack(halves(np.arange(devices), devices), axis=1).reshape(-1)
    return (order[:, None] * half + np.arange(half)).reshape(-1)


def in_order(x: jax.Array, axis_name: str) -> jax.Array:
    """Converts a device's shard [B, T, ...] from placed order to natural sequence order.

    Call inside shard_map. Each device sends both of its halves.
    """
    devices = jax.lax.axis_size(axis_name)
    device = jax.lax.axis_index(axis_name)
    low, high = jnp.split(x, 2, axis=1)
    moved = []
    for odd in (0, 1):
        # One half of each device has an even chunk number, the other an odd one.
        sent = jnp.where(device % 2 == odd, low, high)
        numbers = [c if c % 2 == odd else 2 * devices - 1 - c for c in range(devices)]
        ring = [(c, number // 2) for c, number in enumerate(numbers)]
        moved.append(jax.lax.ppermute(sent, axis_name, ring))
    return jnp.concatenate(moved, axis=1)
