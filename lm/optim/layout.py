"""What a parameter is (a matrix, a stack of matrices, an embedding, a vector), read from its
logical axes, never from its name or rank."""

from collections.abc import Sequence
from typing import NamedTuple


class Layout(NamedTuple):
    """An array as a stack of matrices: `batch` leading stack dimensions, then rows, then columns.

    A vector has no columns. Heads and head width together are one side: q [D, N, H] is D x (N*H).
    """

    batch: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, axes: Sequence[str]) -> "Layout":
        """From logical axes: leading 'layers' and 'expert' stack; a 'norm' is never a matrix."""
        batch = next((i for i, a in enumerate(axes) if a not in ("layers", "expert")), len(axes))
        sides: list[tuple[int, ...]] = []
        for i in range(batch, len(axes)):
            if axes[i] == "head" and sides and axes[i - 1] in ("heads", "kv_heads"):
                sides[-1] += (i,)
            else:
                sides.append((i,))
        if len(sides) < 2 or "norm" in axes:
            return cls(batch, tuple(range(batch, len(axes))), ())
        return cls(batch, sides[0], tuple(i for side in sides[1:] for i in side))

    @property
    def inside(self) -> tuple[int, ...]:
        """The dimensions of one matrix or vector of the stack."""
        return self.rows + self.columns


def decays(axes: Sequence[str], decay_embedding: bool = True) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases and attention sinks; to the
    embedding [vocab, embed] only if `decay_embedding`."""
    layout = Layout.of(axes)
    embedding = axes[layout.batch : layout.batch + 1] == ("vocab",)
    return bool(layout.columns) and (decay_embedding or not embedding)


def is_hidden_matrix(axes: Sequence[str]) -> bool:
    """Whether Muon orthogonalizes it: matrices except embedding, unembedding and routers."""
    layout = Layout.of(axes)
    outer = {"vocab", "router"} & set(axes) or "expert" in axes[layout.batch :]
    return bool(layout.columns) and not outer


def size(shape: Sequence[int], dimensions: Sequence[int]) -> int:
    """The product of these dimensions."""
    total = 1
    for i in dimensions:
        total *= shape[i]
    return total
