"""Rows sorted by group, each multiplied by its group's matrix, as dropless experts need it."""

from kernels_pallas.grouped_matmul.op import grouped_matmul

__all__ = ["grouped_matmul"]
