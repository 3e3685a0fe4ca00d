"""Matmuls with quantized weights of 8, 4 and 3 bits."""

from kernels_pallas.quantized_matmul.op import int8_matmul, packed_matmul
from kernels_pallas.quantized_matmul.packing import Packed, pack, quantize_int8, unpack

__all__ = ["Packed", "int8_matmul", "pack", "packed_matmul", "quantize_int8", "unpack"]
