"""Softmax attention."""

from kernels_pallas.attention.op import flash_attention

__all__ = ["flash_attention"]
