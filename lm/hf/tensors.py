"""The tensors of a Hugging Face folder and the slices of the parameters that they hold."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from lm import trees
from lm.hf.family import WHOLE_MODEL, Family, Row
from lm.model.config import Config
from lm.model.transformer import shapes


class TensorSlice(NamedTuple):
    """One tensor, and the slice of a parameter that it holds.

    name    of the tensor
    path    of the parameter: 'blocks/0/attention/q'
    index   of the slice: leading indices of the parameter (the repeat in a stack, the expert)
    shape   of the tensor
    split   the tensor's shape with bracketed dimensions apart
    order   for each dimension of the slice, its axis in `split`
    """

    name: str
    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]


def tensor_slices(family: Family, config: Config) -> Iterator[TensorSlice]:
    """Every tensor of a model, layer by layer."""
    flat = {path: x.shape for path, x in trees.flatten(shapes(config)).items()}
    outside_layers = {row.ours for row in WHOLE_MODEL}
    first, last = ("embed/table",), ("final_norm/scale", "unembed/w", "score/w")
    yield from _rows(family, flat, "", (), "", lambda row: row.ours in first)
    for number, (prefix, index) in enumerate(layer_paths(config)):
        name = f"model.layers.{number}."
        yield from _rows(
            family, flat, prefix, index, name, lambda row: row.ours not in outside_layers
        )
    yield from _rows(family, flat, "", (), "", lambda row: row.ours in last)


def layer_paths(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The path of each layer's parameters, and the layer's index in their stack."""
    layout = config.layout
    for i in range(len(layout.prefix)):
        yield f"prefix/{i}/", ()
    for repeat in range(layout.repeats):
        for i in range(len(layout.pattern)):
            yield f"blocks/{i}/", (repeat,)
    for i in range(len(layout.suffix)):
        yield f"suffix/{i}/", ()


def _rows(
    family: Family,
    flat: Mapping[str, tuple[int, ...]],
    prefix: str,
    index: tuple[int, ...],
    name: str,
    select: Callable[[Row], bool],
) -> Iterator[TensorSlice]:
    for row in filter(select, family.rows):
        path = prefix + row.ours
        shape = flat.get(path, ())[len(index) :]
        if path not in flat or len(shape) != len(row.axes):
            continue  # a bias that this model does not have, or the other kind of feed-forward
        experts = [()]
        axes, sizes = row.axes, dict(zip(row.axes, shape, strict=True))
        if "{expert}" in row.theirs:
            experts, axes = [(e,) for e in range(sizes["e"])], axes.replace("e", "")
        letters = row.order.replace("(", "").replace(")", "")
        for expert in experts:
            yield TensorSlice(
                name=name + row.theirs.format(expert=expert[0] if expert else None),
                path=path,
                index=index + expert,
                shape=tuple(math.prod(sizes[x] for x in group) for group in _groups(row.order)),
                split=tuple(sizes[letter] for letter in letters),
                order=tuple(letters.index(letter) for letter in axes),
            )


def _groups(order: str) -> list[str]:
    """'(nh)d' -> ['nh', 'd']."""
    groups, inside = [], False
    for letter in order:
        if letter in "()":
            inside = letter == "("
            groups += [""] if inside else []
        elif inside:
            groups[-1] += letter
        else:
            groups.append(letter)
    return groups
