"""Parameter counts and FLOPs, from the declaration alone."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from lm import trees
from lm.model.adapters.adapter import ROOT
from lm.model.config import Config
from lm.model.transformer import axes, shapes


class Counts(NamedTuple):
    """Numbers of weights.

    total      all
    active     those that one token uses; of an MoE's experts the chosen ones
    embedding  the token embedding, which is looked up and, unless tied, not multiplied by
    """

    total: int
    active: int
    embedding: int


def parameter_count(config: Config) -> Counts:
    """Counts the weights of a model."""
    leaves = list(_leaves(config))
    return Counts(
        total=sum(size for _, _, size, _ in leaves),
        active=round(sum(size * share for _, _, size, share in leaves)),
        embedding=config.vocab * config.dim,
    )


def flops(config: Config, length: int) -> float:
    """Forward matmul FLOPs per token of a sequence of `length`: 2 per active weight that is
    multiplied by (the output matrix is, the embedding is not), plus 4 heads head_dim length per
    layer for scores and values, masked pairs included."""
    attention = sum(block.attention.flops(length) for block in config.layout.blocks)
    return 2 * _multiplied(config) + attention


def train_flops(config: Config, length: int) -> float:
    """FLOPs per token of forward and backward pass, as MFU counts them: 6 N + 12 heads head_dim
    keys per layer. N are the active weights that are multiplied by; `keys` is the mean number of
    keys that a query sees: length / 2 if causal, w (1 - w / (2 length)) within a window w. Masked
    pairs and recomputation do not count (PaLM, arXiv:2204.02311, appendix B, with causal attention
    halved). With an adapter the others, which have no gradient, count 4 instead of 6."""
    attention = sum(block.attention.train_flops(length) for block in config.layout.blocks)
    if config.adapter is None:
        return 6 * _multiplied(config) + attention
    adapter = sum(
        x.size for path, x in trees.flatten(shapes(config)).items() if path.startswith(f"{ROOT}/")
    )
    return 4 * _multiplied(config) + 2 * adapter + attention


def _multiplied(config: Config) -> float:
    """Active weights in matmuls: matrices have an axis "embed", biases and norms do not."""
    matrices = sum(
        size * share
        for path, names, size, share in _leaves(config)
        if "embed" in names and path != "embed/table"
    )
    return matrices + (config.vocab * config.dim if config.tied else 0)


def _leaves(config: Config) -> Iterator[tuple[str, tuple[str, ...], int, float]]:
    """Path, logical axes, size, and the share of the weight that one token uses."""
    blocks, names = config.layout.parts, trees.flatten(axes(config))
    for path, shape in trees.flatten(shapes(config)).items():
        part, i, *rest = path.split("/")
        in_ffn = rest[:1] == ["ffn"]
        share = blocks[part][int(i)].ffn.active_share(names[path]) if in_ffn else 1.0
        yield path, names[path], math.prod(shape.shape), share
