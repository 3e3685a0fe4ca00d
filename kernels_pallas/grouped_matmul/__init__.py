"""Matmul of rows sorted by group with one matrix per group, for dropless mixture of experts."""

from kernels_pallas.grouped_matmul.op import grouped_matmul

__all__ = ["grouped_matmul"]
