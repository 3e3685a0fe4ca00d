"""Next-token cross-entropy from hidden states, with the vocabulary handled in chunks."""

from kernels_pallas.cross_entropy.op import cross_entropy, token_losses

__all__ = ["cross_entropy", "token_losses"]
