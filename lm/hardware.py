"""How fast this machine multiplies: published peaks of accelerators, else a measurement."""

import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

# Dense bf16 FLOP/s per jax device, from the vendors' pages (cloud.google.com/tpu/docs, nvidia.com),
# November 2026. Keys are beginnings of jax.Device.device_kind; on v4 and v5p a device is a whole
# chip, on TPU7x half of one.
PEAK_BF16: Mapping[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device, dtype: str = "float32") -> float:
    """FLOP/s of one device: the published bf16 peak where it is known, else the matmul rate
    measured in `dtype`."""
    for kind, flops in PEAK_BF16.items():
        if device.device_kind.startswith(kind):
            return flops
    return matmul_flops(dtype)


def machine_flops(mesh: jax.sharding.Mesh, dtype: str = "float32") -> float:
    """FLOP/s of all devices of a mesh together. Virtual CPU devices share one processor."""
    device = mesh.devices.flat[0]
    shares = jax.process_count() if device.platform == "cpu" else mesh.devices.size
    return shares * peak_flops(device, dtype)


def matmul_flops(dtype: str = "float32", size: int | None = None, repeats: int = 7) -> float:
    """Measured FLOP/s of a square matrix product on the default device, the best of `repeats`:
    whatever else runs on the machine can only slow it."""
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    # Random, since products of zeros run faster on chips that are limited by power.
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
