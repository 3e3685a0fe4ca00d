"""What every quantization of weights has in common."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from lm.trees import Leaf


@dataclass(frozen=True, kw_only=True)
class Quantizer(abc.ABC):
    """Declares how the matrices of a model's layers are stored. Quantized weights are frozen."""

    def applies(self, path: str, axes: Sequence[str]) -> bool:
        """Whether the weight of this path and these logical axes is quantized: the matrices of the
        layers, but not routers, whose near-ties decide the choice of experts."""
        in_layers = path.split("/")[0] in ("prefix", "blocks", "suffix")
        return in_layers and len(axes) > 1 and "embed" in axes and "router" not in axes

    @abc.abstractmethod
    def quantize(self, w: jax.Array, axes: Sequence[str]) -> Leaf:
        """The quantized weight; `axes` are its logical axes, one per dimension."""
