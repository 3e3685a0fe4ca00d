"""LoRA: a low-rank change of frozen matrices (Hu et al., arXiv:2106.09685)."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from lm import trees
from lm.errors import UserError, check_positive, check_size, nearest
from lm.model.adapters.adapter import ROOT, Adapter, Weight
from lm.model.dropout import dropout, next_key
from lm.model.initializers import Initializer, zeros


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """Adds scale * a @ b to each target matrix. `a` starts random, `b` at zero, so training starts
    from the frozen model. With `model.quant=NF4()` this is QLoRA.

    Args:
      rank: inner width of a @ b.
      alpha: scale is alpha / rank.
      rslora: scale is alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732).
      targets: patterns of the paths of matrices. Default: all of attention and feed-forward.
        Routers and vectors never match.
      dropout: rate on the input of `a`, in training.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    targets: tuple[str, ...] = ("**/attention/*", "**/ffn/**")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_size(**{"model.adapter.rank": self.rank})
        check_positive(**{"model.adapter.alpha": self.alpha})
        if not 0 <= self.dropout < 1:
            raise UserError(
                f"model.adapter.dropout={self.dropout!r} must be at least 0 and below 1."
            )

    @property
    def scale(self) -> float:
        """The factor on a @ b."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def declare(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        matrices = [path for path, weight in weights.items() if _is_matrix(path, weight)]
        chosen = set()
        for pattern in self.targets:
            matching = {path for path in matrices if trees.matches(path, pattern)}
            if not matching:
                raise UserError(
                    f"model.adapter.targets={pattern!r} matches no matrix."
                    f"{nearest(pattern, matrices)}"
                )
            chosen |= matching
        declared = dict(weights)
        for path in matrices:
            if path in chosen:
                declared |= self._declare(path, weights[path])
        return declared

    def continues(self, other: Adapter | None) -> bool:
        same = isinstance(other, LoRA) and (self.rank, self.scale) == (other.rank, other.scale)
        return same and self.targets == other.targets

    def check_merges(self, where: str) -> None:
        """A matrix may be changed."""

    def _declare(self, path: str, weight: Weight) -> dict[str, Weight]:
        shape, axes = weight.shape.shape, weight.axes
        stack, inputs = _split(axes)
        middle = stack + inputs
        fan_in = math.prod(shape[stack:middle])
        a = (*shape[:middle], self.rank), (*axes[:middle], "rank")
        b = (*shape[:stack], self.rank, *shape[middle:]), (*axes[:stack], "rank", *axes[middle:])
        return {
            f"{ROOT}/{path}/{name}": Weight(jax.ShapeDtypeStruct(x, jnp.float32), names, init)
            for name, (x, names), init in (("a", a, _uniform(fan_in)), ("b", b, zeros))
        }

    def bind(self, weights: dict[str, Any], modules: Mapping[str, Weight]) -> dict[str, Any]:
        bound = {}
        for path, base in weights.items():
            a = weights.get(f"{ROOT}/{path}/a")
            if a is not None:
                b = weights[f"{ROOT}/{path}/b"]
                base = LoRAWeight(base, a, b, self.scale, self.dropout)
            if not path.startswith(f"{ROOT}/"):
                bound[path] = base
        return bound


def _is_matrix(path: str, weight: Weight) -> bool:
    axes = weight.axes
    return (
        len(axes) > 1
        and "embed" in axes
        and not {"router", "score"} & set(axes)
        and not path.startswith(f"{ROOT}/")
    )


def _split(axes: Sequence[str]) -> tuple[int, int]:
    """(leading axes of stacked layers and experts, axes of the input after them). A matrix reads
    the model width, or writes it and reads the others."""
    stack = sum(name in ("layers", "expert") for name in axes)
    return stack, 1 if axes[stack] == "embed" else len(axes) - stack - 1


@cache
def _uniform(fan_in: int) -> Initializer:
    """Uniform in +-1 / sqrt(fan in), as torch's linear layers start."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRAWeight(trees.Leaf):
    """base + scale * a @ b. `base` [..., in, out] is an array or another leaf; a [..., in, rank], b
    [..., rank, out]."""

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    rate: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def astype(self, dtype: Any) -> "LoRAWeight":
        arrays = {name: getattr(self, name).astype(dtype) for name in ("base", "a", "b")}
        return dataclasses.replace(self, **arrays)

    def dense(self) -> jax.Array:
        base = self.base.dense() if trees.is_leaf(self.base) else self.base
        # base has the axes [stack, in, out], a [stack, in, rank] and b [stack, rank, out].
        stack = self.a.ndim + self.b.ndim - base.ndim - 2
        lead, rank = base.shape[:stack], self.a.shape[-1]
        a = self.a.astype(jnp.float32).reshape(*lead, -1, rank)
        b = self.b.astype(jnp.float32).reshape(*lead, rank, -1)
        change = self.scale * jnp.matmul(a, b).reshape(base.shape)
        return (base.astype(jnp.float32) + change).astype(base.dtype)

    def einsum(
        self, equation: str, x: jax.Array, axes: Sequence[str], product: Callable[..., jax.Array]
    ) -> jax.Array:
        letters, y = equation.split("->")
        x_letters, w_letters = letters.split(",")
        inputs = "".join(letter for letter in w_letters if letter in x_letters)
        outputs = "".join(letter for letter in w_letters if letter not in x_letters)
        kept = "".join(letter for letter in x_letters if letter not in inputs)
        count = len(inputs)
        out = product(equation, x, self.base, axes)
        rows = dropout(x, self.rate, next_key()) if self.rate else x
        inner = product(f"{x_letters},{inputs}r->{kept}r", rows, self.a, (*axes[:count], "rank"))
        inner *= jnp.asarray(self.scale, inner.dtype)  # the narrow array
        change = product(f"{kept}r,r{outputs}->{y}", inner, self.b, ("rank", *axes[count:]))
        return out + change

    def of_arrays(self, function: Callable[..., Any], axes: Sequence[str]) -> Any:
        stack, inputs = _split(axes)
        middle = stack + inputs
        is_leaf = trees.is_leaf(self.base)
        return dataclasses.replace(
            self,
            base=self.base.of_arrays(function, axes) if is_leaf else function(axes, self.base),
            a=function((*axes[:middle], "rank"), self.a),
            b=function((*axes[:stack], "rank", *axes[middle:]), self.b),
        )
