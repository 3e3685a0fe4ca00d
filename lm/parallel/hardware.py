"""Published rates of accelerators, and the measured matmul rate of this machine."""

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of accelerator. Rates are per chip and second.

    kinds          prefixes of jax.Device.device_kind
    flops          dense bfloat16 FLOP/s
    hbm_bandwidth  bytes/s
    hbm            bytes that a jax device may use, as libtpu's compiler allows
    devices        jax devices per chip
    links, link    interconnect: links per chip, and bytes/s through one link in one direction
    dims, ring     dimensions of the torus; a dimension of a multiple of `ring` chips is a ring
    network        bytes/s between slices, from or to a chip
    cores          units per chip in the number of a slice's name (v5p-64: 64 cores, 32 chips)

    The last six are 0 or 1 for chips that lm.planning does not support.
    """

    kinds: tuple[str, ...]
    flops: float
    hbm_bandwidth: float
    hbm: float
    devices: int = 1
    links: int = 0
    link: float = 0.0
    dims: int = 0
    ring: int = 0
    network: float = 0.0
    cores: int = 1


# FLOP/s, memory, links and network from docs.cloud.google.com/tpu/docs (links are quoted there for
# both directions together, the network in bits and on some pages for a whole pod) and nvidia.com,
# November 2026. Usable memory from error messages of libtpu 0.0.42. Rings from the same pages:
# dimensions of a multiple of 4 chips on v5p and tpu7x, of 16 on v5e and v6e.
CHIPS: Mapping[str, Chip] = {
    "v4": Chip(kinds=("TPU v4",), flops=275e12, hbm_bandwidth=1228e9, hbm=32e9),
    "v5e": Chip(
        kinds=("TPU v5 lite", "TPU v5e"), flops=197e12, hbm_bandwidth=819e9, hbm=15.75 * GIB,
        links=4, link=50e9, dims=2, ring=16, network=3.125e9,
    ),
    "v5p": Chip(
        kinds=("TPU v5p", "TPU v5"), flops=459e12, hbm_bandwidth=2765e9, hbm=95.74 * GIB,
        links=6, link=100e9, dims=3, ring=4, network=6.25e9, cores=2,
    ),
    "v6e": Chip(
        kinds=("TPU v6 lite", "TPU v6e"), flops=918e12, hbm_bandwidth=1638e9, hbm=31.25 * GIB,
        links=4, link=100e9, dims=2, ring=16, network=12.5e9,
    ),
    "tpu7x": Chip(
        kinds=("TPU7x",), flops=2307e12, hbm_bandwidth=7380e9, hbm=94.75 * GIB, devices=2,
        links=6, link=100e9, dims=3, ring=4, network=12.5e9, cores=2,
    ),
    "A100": Chip(kinds=("NVIDIA A100",), flops=312e12, hbm_bandwidth=2039e9, hbm=80e9),
    "H100": Chip(kinds=("NVIDIA H100",), flops=989e12, hbm_bandwidth=3352e9, hbm=80e9),
    "H200": Chip(kinds=("NVIDIA H200",), flops=989e12, hbm_bandwidth=4800e9, hbm=141e9),
}  # fmt: skip


def chip_of(device: jax.Device) -> Chip | None:
    """The chip of a jax device; None where it is not in CHIPS."""
    for chip in CHIPS.values():
        if device.device_kind.startswith(chip.kinds):
            return chip
    return None


def peak_flops(device: jax.Device, dtype: str = "float32") -> float:
    """FLOP/s of one device: the published bfloat16 peak, or for an unknown device the matmul rate
    measured in `dtype`."""
    chip = chip_of(device)
    return _measured(dtype) if chip is None else chip.flops / chip.devices


@functools.cache
def _measured(dtype: str) -> float:
    return matmul_flops(dtype)  # once per process


def machine_flops(mesh: jax.sharding.Mesh, dtype: str = "float32") -> float:
    """FLOP/s of all devices of a mesh. Virtual CPU devices share one processor."""
    device = mesh.devices.flat[0]
    shares = jax.process_count() if device.platform == "cpu" else mesh.devices.size
    return shares * peak_flops(device, dtype)


def matmul_flops(dtype: str = "float32", size: int | None = None, repeats: int = 7) -> float:
    """Measured FLOP/s of a square matmul on the default device: the best of `repeats`, because
    other work on the machine can only slow it down."""
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    # Random values: matmuls of zeros run faster on chips that are limited by power.
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


@functools.cache
def compiles(dtype: str) -> bool:
    """Whether XLA compiles arithmetic in `dtype` for this machine. float16 on a CPU needs F16C,
    which x86 processors have since 2012."""
    try:
        jax.jit(lambda x: x.astype(dtype) * 2)(jnp.ones(64, jnp.float32))
    except jax.errors.JaxRuntimeError as error:
        if "Failed to materialize symbols" not in str(error):  # XLA's words for it
            raise
        return False
    return True
