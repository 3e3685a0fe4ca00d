"""Parameters and floating-point operations, from the declaration alone."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from lm import trees
from lm.model.config import Block, Config
from lm.model.transformer import axes, shapes


class Counts(NamedTuple):
    """total: all weights; active: those that one token meets, which of an MoE's experts are the
    chosen ones; embedding: the token table, which is looked up and, unless tied, never multiplied
    by."""

    total: int
    active: int
    embedding: int


def parameter_count(config: Config) -> Counts:
    """How many weights there are."""
    leaves = list(_leaves(config))
    return Counts(
        total=sum(size for _, _, size, _ in leaves),
        active=round(sum(size * share for _, _, size, share in leaves)),
        embedding=config.vocab * config.dim,
    )


def flops(config: Config, length: int) -> float:
    """Forward matrix-product FLOPs per token of a sequence of `length`: 2 per active weight that is
    multiplied by (the output matrix is, the embedding is not) and 4 heads head_dim length per layer
    for scores and values, with masked pairs counted too, as plain attention computes them."""
    return 2 * _multiplied(config) + sum(4 * _width(block) * length for block in _blocks(config))


def train_flops(config: Config, length: int) -> float:
    """FLOPs per token of forward and backward pass, as MFU counts them: 6 N + 12 heads head_dim
    keys per layer, where N are the active weights that are multiplied by and `keys` is how many
    keys a query sees on average: length / 2 when causal, w (1 - w / (2 length)) within a window w,
    so that masked pairs and recomputation count as nothing (PaLM, arXiv:2204.02311, appendix B,
    with causal attention halved)."""
    attention = sum(12 * _width(block) * _keys(block, length) for block in _blocks(config))
    return 6 * _multiplied(config) + attention


def _blocks(config: Config) -> tuple[Block, ...]:
    return config.layout.blocks


def _width(block: Block) -> int:
    return block.attention.heads * block.attention.head_dim


def _keys(block: Block, length: int) -> float:
    if not block.attention.causal:
        return length
    window = min(block.attention.window or length, length)
    return window * (1 - window / (2 * length))


def _multiplied(config: Config) -> float:
    """Active weights in matrix products: matrices have a side on the residual stream, biases and
    norms have not."""
    matrices = sum(
        size * share
        for path, names, size, share in _leaves(config)
        if "embed" in names and path != "embed/table"
    )
    return matrices + (config.vocab * config.dim if config.tied else 0)


def _leaves(config: Config) -> Iterator[tuple[str, tuple[str, ...], int, float]]:
    """Path, logical axes, size, and the share of it that one token meets."""
    layout = config.layout
    blocks = {"prefix": layout.prefix, "blocks": layout.pattern, "suffix": layout.suffix}
    names = trees.flatten(axes(config))
    for path, shape in trees.flatten(shapes(config)).items():
        share = 1.0
        if "expert" in names[path]:
            part, i, *_ = path.split("/")
            ffn = blocks[part][int(i)].ffn
            share = ffn.experts_per_token / ffn.experts
        yield path, names[path], math.prod(shape.shape), share
