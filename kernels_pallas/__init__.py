"""Kernels: one folder each. A plain-JAX reference is its specification; an op chooses what runs.

This package never imports lm.
"""

from kernels_pallas.attention import flash_attention
from kernels_pallas.cross_entropy import cross_entropy, token_losses
from kernels_pallas.grouped_matmul import grouped_matmul

__all__ = ["cross_entropy", "flash_attention", "grouped_matmul", "token_losses"]
