"""Rows sorted by group, each multiplied by its group's matrix: the matrix product of a dropless mixture of experts."""

from kernels_pallas.grouped_matmul.op import grouped_matmul

__all__ = ["grouped_matmul"]
