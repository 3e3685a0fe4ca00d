"""Quantized weights: `trees.Leaf` types, and the configs that declare them.

quantizer   the base class `Quantizer`: which weights are quantized, and how
nf4         4-bit NormalFloat with double quantization (QLoRA)
"""

from lm.quant.nf4 import NF4, NF4Array
from lm.quant.quantizer import Quantizer

__all__ = ["NF4", "NF4Array", "Quantizer"]
