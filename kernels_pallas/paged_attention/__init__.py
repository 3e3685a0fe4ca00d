"""Attention of new tokens to the pages of a cache."""

from kernels_pallas.paged_attention.op import paged_attention

__all__ = ["paged_attention"]
