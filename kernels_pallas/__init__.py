"""Kernels, one folder each: `reference.py` is the specification in plain JAX, `op.py` the public
function, which selects the implementation for the platform. This package never imports lm.
"""

from kernels_pallas.attention import flash_attention
from kernels_pallas.cross_entropy import cross_entropy, token_losses
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.paged_attention import paged_attention, write_pages
from kernels_pallas.ring_attention import (
    gathered_attention,
    in_order,
    placement,
    ring_attention,
)

__all__ = [
    "cross_entropy",
    "flash_attention",
    "gathered_attention",
    "grouped_matmul",
    "in_order",
    "paged_attention",
    "placement",
    "ring_attention",
    "token_losses",
    "write_pages",
]
