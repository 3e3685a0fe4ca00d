"""Context parallelism: attention over sequences sharded over devices."""

from kernels_pallas.ring_attention.op import gathered_attention, ring_attention
from kernels_pallas.ring_attention.placement import in_order, placement

__all__ = ["gathered_attention", "in_order", "placement", "ring_attention"]
