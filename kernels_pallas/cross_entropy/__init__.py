"""Next-token cross-entropy from hidden states, chunked over positions and vocabulary."""

from kernels_pallas.cross_entropy.op import cross_entropy, token_losses

__all__ = ["cross_entropy", "token_losses"]
