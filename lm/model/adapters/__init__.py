"""Adapters: small trainable weights beside a frozen model.

adapter     the base class `Adapter`
lora        a low-rank change of matrices
prefix      trained keys and values
bottleneck  a small feed-forward after each sublayer
merge       the model without an adapter that computes the same
"""

from lm.model.adapters.adapter import Adapter, Weight
from lm.model.adapters.bottleneck import Bottleneck
from lm.model.adapters.lora import LoRA, LoRAWeight
from lm.model.adapters.prefix import Prefix

__all__ = ["Adapter", "Bottleneck", "LoRA", "LoRAWeight", "Prefix", "Weight"]
