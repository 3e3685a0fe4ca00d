"""Attention of new tokens to a paged KV cache, for decoding, and writing their keys and values into
its pages."""

from kernels_pallas.paged_attention.op import paged_attention
from kernels_pallas.paged_attention.write import write_pages

__all__ = ["paged_attention", "write_pages"]
