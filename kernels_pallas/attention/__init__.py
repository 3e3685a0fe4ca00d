"""Softmax attention."""

from kernels_pallas.attention.op import attention

__all__ = ["attention"]
