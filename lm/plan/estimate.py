"""The half of a plan that needs no compiler: memory and time from the declaration and the chip's
constants.

Time is a roofline: matrix products at MATMUL of the peak, element-wise work and kernels' operands
at HBM of the memory's bandwidth, collectives at the links' speed. The two shares are assumptions,
the same for every chip and model.
"""

import math
from typing import NamedTuple

from lm import model, show
from lm.experiment import Experiment
from lm.mesh import Place
from lm.plan import links
from lm.plan.slices import Slice

MATMUL = 0.90  # of the peak in large products: assumed
HBM = 0.85  # of the bandwidth in streaming: assumed
# A product's operands are read once for every tile of its result: the side of a square tile whose
# float32 sums and operands fill the 16 MiB of vector memory that a program gets by default.
TILE = 1024

# How often an array of a layer of this width is read or written in the forward pass outside of
# products: norms, rotations, residuals (of the model's width), the gate (of the feed-forward's).
WIDE, HIDDEN = 10, 4

FORWARDS = {"none": 0.0, "dots": 0.0, "block": 1.0}  # forward passes' products computed anew


class Estimate(NamedTuple):
    """Per device: bytes, and seconds of a step.

    compute is products and memory together, one after the other; links is all collectives.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    working: int
    compute: float
    links: float
    exposed: float
    bubble: float

    @property
    def state(self) -> int:
        return self.parameters + self.optimizer

    @property
    def peak(self) -> int:
        return self.state + self.gradients + self.activations + self.working

    @property
    def seconds(self) -> float:
        """With the gathering of weights and the summing of gradients behind the products, and
        `exposed` collectives, which products wait for, in the open."""
        hidden = self.links - self.exposed
        return (max(self.compute, hidden) + self.exposed) / (1 - self.bubble)


class _Sizes(NamedTuple):
    """Of one layer, before any split: weights, and those that a token meets; widths of queries, of
    a head, of keys, of what stands between the feed-forward's matrices; keys that a query sees."""

    weights: float
    active: float
    heads: int
    head_dim: int
    kv: int
    hidden: float
    keys: float


def estimate(e: Experiment, place: Place, where: Slice, again: float | None = None) -> Estimate:
    """Of a step at this place of this slice; `again` is the share of the forward pass's products
    that the backward pass computes anew (default: what the place's remat says)."""
    mesh = place.mesh
    layers = [_sizes(e, block) for block in e.model.layout.blocks]
    ways = mesh.data * mesh.fsdp * mesh.expert * mesh.context
    tokens = e.batch.sequences * e.batch.length / ways  # through each stage of a pipeline
    part = tokens / place.microbatches
    state = show.memory(e, mesh.abstract())
    again = FORWARDS.get(place.remat, 1.0) if again is None else again
    on_links, exposed = _links(e, place, where, layers, part, again)
    return Estimate(
        parameters=state["parameters"],
        optimizer=state["optimizer"],
        gradients=state["gradients"] // (2 if place.microbatches == 1 and _half(e) else 1),
        activations=int(_saved(e, place, layers, part)),
        working=int(_working(e, place, layers, part) + _copies(state["parameters"], e)),
        compute=_compute(e, place, where, layers, part, again, state["parameters"]),
        links=on_links,
        exposed=exposed,
        bubble=bubble(place),
    )


def _compute(
    e: Experiment,
    place: Place,
    where: Slice,
    layers: list[_Sizes],
    part: float,
    again: float,
    parameters: int,
) -> float:
    """Seconds of products, memory and the optimizer, for `part` tokens in each micro-batch."""
    chip, dim, tensor = where.chip, e.model.dim, place.mesh.tensor
    flops, hbm = MATMUL * chip.flops / chip.devices, HBM * chip.hbm_bandwidth / chip.devices
    seconds = 0.0
    for layer in layers:
        products = 2 * part * layer.active / tensor
        tiles = products * 2 / TILE  # bytes: both operands, two a number
        traffic = 2 * part * (WIDE * dim + HIDDEN * layer.hidden / tensor)
        seconds += (3 + again) * (max(products / flops, tiles / hbm) + traffic / hbm)
        # The backward pass of attention computes the scores anew: five products for two. They have
        # the head's width for a side, which may be less than the matrix unit's.
        attention = (3.5 + again) * 4 * part * layer.heads * layer.keys / tensor
        seconds += attention / flops / min(1, layer.head_dim / chip.mxu)
    seconds /= place.mesh.pipe
    seconds += 3 * 2 * part * dim * e.model.vocab / tensor / flops
    # The optimizer reads and writes float32 weight and moments and reads a gradient.
    return place.microbatches * seconds + 28 * parameters / 4 / hbm


def _working(e: Experiment, place: Place, layers: list[_Sizes], part: float) -> float:
    """Bytes that one layer's backward pass, or the vocabulary's, needs for a while."""
    dim, tensor = e.model.dim, place.mesh.tensor
    widest = max(layer.hidden for layer in layers) / tensor
    largest = max(layer.weights for layer in layers) / tensor / place.mesh.expert
    layer = 2 * part * (7 * widest + 8 * dim) + 3 * 2 * largest
    # The output matrix in bfloat16, its gradient in float32, and the logits of a chunk.
    vocabulary = 6 * dim * e.model.vocab / tensor + 8 * 2**27
    return max(layer, vocabulary if place.mesh.size > 1 else 0)


def bubble(place: Place) -> float:
    """The share of a step in which a pipeline's stages wait: (stages - 1) of as many turns as there
    are micro-batches and waits together (GPipe, arXiv:1811.06965)."""
    stages = place.mesh.pipe
    return (stages - 1) / (place.microbatches + stages - 1)


def attention_flops(e: Experiment) -> float:
    """Of scores and values, forward, per token: 4 heads head_dim keys in every layer."""
    layers = (_sizes(e, block) for block in e.model.layout.blocks)
    return sum(4 * layer.heads * layer.keys for layer in layers)


def _half(e: Experiment) -> bool:
    return e.precision.compute != "float32"


def _copies(parameters: int, e: Experiment) -> int:
    """The copy of the parameters in the format of the arithmetic."""
    return parameters // 2 if _half(e) and e.precision.params == "float32" else 0


def _sizes(e: Experiment, block: model.Block) -> _Sizes:
    a, ffn, dim = block.attention, block.ffn, e.model.dim
    heads, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    attention = dim * (2 * heads + 2 * kv)
    keys = e.batch.length
    if a.causal:
        window = min(a.window or keys, keys)
        keys = window * (1 - window / (2 * keys))
    experts, chosen = getattr(ffn, "experts", 1), getattr(ffn, "active", 1)
    matrices = 3 if isinstance(ffn, model.MoE | model.SwiGLU | model.GeGLU) else 2
    shared = getattr(ffn, "shared", None)
    common = 3 * dim * shared.hidden if shared else 0
    one = matrices * dim * ffn.hidden
    hidden = chosen * ffn.hidden + (shared.hidden if shared else 0)
    return _Sizes(
        weights=attention + experts * one + common,
        active=attention + chosen * one + common,
        heads=heads,
        head_dim=a.head_dim,
        kv=kv,
        hidden=hidden,
        keys=keys,
    )


def _saved(e: Experiment, place: Place, layers: list[_Sizes], part: float) -> float:
    """Bytes kept for the backward pass."""
    size, tensor, dim = (2 if _half(e) else 4), place.mesh.tensor, e.model.dim
    total = 0.0
    for layer in layers:
        width = dim
        if place.remat != "block":
            width += (2 * layer.heads + 2 * layer.kv + 2 * layer.hidden) / tensor + dim
        if place.remat == "none":
            width += (layer.heads + layer.hidden) / tensor + 2 * dim
        total += size * part * width
    in_flight = min(place.microbatches, place.mesh.pipe) if place.mesh.pipe > 1 else 1
    return total / place.mesh.pipe * in_flight


def _links(
    e: Experiment, place: Place, where: Slice, layers: list[_Sizes], part: float, again: float
) -> tuple[float, float]:
    """(seconds on the links in all, those of them that products wait for)."""
    mesh = place.mesh
    size = 2 if _half(e) else 4
    parallel = {axis: n for axis, n in _used(place).items() if n > 1}
    if not parallel:
        return 0.0, 0.0

    bits = sum(math.log2(n) for n in parallel.values())
    directions = 2 if all(where.rings()) else 1

    def rate(axis: str) -> float:
        """The dimensions of the torus are shared out over the axes of the mesh by the logarithm of
        their sizes, as a mesh is laid over a torus; an axis has one at least."""
        dims = max(where.chip.dims * math.log2(parallel[axis]) / bits, 1)
        return directions * dims * where.chip.link / where.chip.devices

    total = exposed = 0.0
    for layer in layers:
        weights = size * layer.weights / mesh.tensor / mesh.expert / mesh.pipe
        if mesh.fsdp > 1:
            moved = (2 + 1) * weights * (mesh.fsdp - 1) / mesh.fsdp * place.microbatches
            total += moved / rate("fsdp")
        stream = size * part * e.model.dim * place.microbatches / mesh.pipe
        if mesh.tensor > 1:
            ways = (mesh.tensor - 1) / mesh.tensor
            seconds = (4 + 2 * again) * 2 * stream * ways / rate("tensor")
            total, exposed = total + seconds, exposed + seconds
        if mesh.expert > 1:
            seconds = (4 + 2 * again) * stream * (mesh.expert - 1) / rate("expert")
            total, exposed = total + seconds, exposed + seconds
        if mesh.context > 1:
            seconds = (3 + again) * size * part * layer.kv * 2 * mesh.context / rate("context")
            total, exposed = total + seconds, exposed + seconds / 2
    if mesh.data > 1:
        gradients = show.memory(e, mesh.abstract())["gradients"] / (2 if size == 2 else 1)
        total += 2 * gradients / rate("data")
    return total + links.HOP * len(layers), exposed


def _used(place: Place) -> dict[str, int]:
    return {
        axis: getattr(place.mesh, axis) for axis in ("data", "fsdp", "tensor", "expert", "context")
    }
