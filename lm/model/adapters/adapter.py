"""What all adapters have in common: small trainable weights beside a frozen model.

The weights of an adapter lie under `adapter/` in the nested dict of a model's weights. `declare`
names them; `bind` puts them where the modules read them.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lm.errors import UserError
from lm.model.initializers import Initializer

ROOT = "adapter"


class Weight(NamedTuple):
    """A declared weight: shape and dtype, logical axes, initializer, with the axis of stacked
    layers."""

    shape: Any  # jax.ShapeDtypeStruct, or a trees.Leaf of them
    axes: tuple[str, ...]
    init: Initializer


@dataclass(frozen=True, kw_only=True)
class Adapter(abc.ABC):
    """Declares an adapter. With one, training changes only the adapter's weights, and a checkpoint
    holds only these."""

    @abc.abstractmethod
    def declare(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """The weights to store, by path, from those of the modules."""

    @abc.abstractmethod
    def bind(self, weights: dict[str, Any], modules: Mapping[str, Weight]) -> dict[str, Any]:
        """The weights of the modules, by path, from the stored ones; `modules` declares the
        former."""

    @property
    def is_computed(self) -> bool:
        """Whether `bind` computes weights of the modules that are not stored."""
        return False

    def continues(self, other: "Adapter | None") -> bool:
        """Whether the weights of this adapter can go on training as those of `other`."""
        return self == other

    def check_merges(self, where: str) -> None:
        """Raises UserError, with `where` first, if no model without the adapter computes the
        same."""
        raise UserError(
            f"{where} has model.adapter={type(self).__name__}(...), which cannot be merged into "
            "the weights; keep the same adapter."
        )


def moved(weights: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The weights with those of modules of these names under ROOT."""
    return {
        f"{ROOT}/{path}" if set(keys) & set(path.split("/")) else path: weight
        for path, weight in weights.items()
    }


def moved_back(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `moved`."""
    return {path.removeprefix(f"{ROOT}/"): weight for path, weight in weights.items()}
