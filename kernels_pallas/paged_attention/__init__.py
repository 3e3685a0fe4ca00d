"""Attention of new tokens to a paged KV cache, for decoding."""

from kernels_pallas.paged_attention.op import paged_attention

__all__ = ["paged_attention"]
