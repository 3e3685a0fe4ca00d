"""The half of a plan that needs no compiler: memory and time from the declaration and the chip's
constants.

Time is a roofline: matrix products at MATMUL of the peak, element-wise work and kernels' operands
at HBM of the memory's bandwidth, collectives at the links' speed. The two shares are assumptions,
the same for every chip and model.
"""

import math
from typing import NamedTuple

from lm import model
from lm.experiment import Experiment
from lm.parallel import sharding
from lm.parallel.mesh import AXES, Place
from lm.planning import links, show
from lm.planning.slices import Slice

MATMUL = 0.90  # of the peak in large products: assumed
HBM = 0.85  # of the bandwidth in streaming: assumed
# Of the peak in attention's kernels, forward, and forward and backward together, with heads of 128:
# what the softmax leaves, counted from the compiled kernels (kernels_pallas/README.md). The vector
# units take a time for each score, whatever the width of a head.
ATTENTION = {
    "v5e": (0.85, 0.88), "v5p": (0.84, 0.88), "v6e": (0.44, 0.45), "tpu7x": (0.47, 0.47),
}  # fmt: skip
# A product's operands are read once for every tile of its result: the side of a square tile whose
# float32 sums and operands fill the 16 MiB of vector memory that a program gets by default.
TILE = 1024

# How often an array of a layer of this width is read or written in the forward pass outside of
# products: norms, rotations, residuals (of the model's width); the gate (of the feed-forward's);
# rows that go to experts, sorted, sent, weighted, sent back and summed (as in a compiled step).
WIDE, HIDDEN, ROWS = 10, 4, 30

# Which share of the forward pass the backward pass computes anew, besides element-wise work: of the
# products with weights, and of attention, whose kernels are no such products.
FORWARDS = {"none": (0.0, 0.0), "dots": (0.0, 0.0), "block": (1.0, 1.0), "stage": (1.0, 1.0)}


class Estimate(NamedTuple):
    """Per device: bytes, and seconds of a step.

    compute is products and memory together, one after the other, without the waits of a pipeline,
    of which `bubble` is the share while its layers run, `layers` seconds; links is all collectives.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    working: int
    compute: float
    layers: float
    links: float
    exposed: float
    bubble: float
    offloaded: bool = False

    @property
    def state(self) -> int:
        return self.parameters + self.optimizer

    @property
    def peak(self) -> int:
        passes = self.activations + self.working
        if self.offloaded:  # the optimizer's state is there only for the update
            return self.parameters + self.gradients + max(passes, self.optimizer)
        return self.state + self.gradients + passes

    @property
    def seconds(self) -> float:
        """With the gathering of weights and the summing of gradients behind the products, and
        `exposed` collectives, which products wait for, in the open."""
        waiting = self.layers * self.bubble / (1 - self.bubble)
        hidden = self.links - self.exposed
        return max(self.compute + waiting, hidden) + self.exposed


class _Sizes(NamedTuple):
    """Of one layer, before any split.

    weights, active    all that are not experts', and those that a token meets
    experts, routed    the routed experts' weights, and those that a token meets
    rows               how many experts a token goes to
    heads, kv          widths of queries, and of keys or values; head_dim that of one head
    hidden, chosen     what stands between the matrices of the feed-forward, and of chosen experts
    keys               that a query sees
    """

    active: float
    experts: float
    routed: float
    rows: int
    heads: int
    head_dim: int
    kv: int
    hidden: float
    chosen: float
    keys: float

    @property
    def weights(self) -> float:
        return self.active + self.experts


def state_at(e: Experiment, place: Place) -> dict[str, int]:
    """Bytes per device of parameters, gradients and optimizer, the same for all places of a mesh
    and a number of rounds."""
    return show.memory(e, place.mesh.abstract(), sharding.rules_at(place))


def estimate(
    e: Experiment,
    place: Place,
    where: Slice,
    *,
    again: float | None = None,
    attention: tuple[float, float] | None = None,
    state: dict[str, int] | None = None,
) -> Estimate:
    """Of a step at this place of this slice.

    Args:
        again: the share of the forward pass that the backward pass computes anew (default: what
            the place's remat says).
        attention: shares of the peak in attention's kernels (default: those of ATTENTION).
        state: what `state_at` says of the place, where it is known already.
    """
    mesh = place.mesh
    layers = [_sizes(e, block) for block in e.model.layout.blocks]
    ways = mesh.data * mesh.fsdp * mesh.expert * mesh.context
    tokens = e.batch.sequences * e.batch.length / ways  # through each stage of a pipeline
    part = tokens / place.microbatches
    state = state or state_at(e, place)
    schedule = e.pipeline_at(place)
    again = _again(place) if again is None else (again, again)
    half = _half(e) if place.microbatches == 1 else place.accumulate == "bfloat16"
    gradients = state["gradients"] // (2 if half else 1)
    shares = attention or ATTENTION[where.generation]
    compute, in_layers = _compute(e, place, where, layers, part, again, shares, state["parameters"])
    on_links, exposed = _links(e, place, where, layers, part, again[0], gradients)
    return Estimate(
        parameters=state["parameters"],
        optimizer=state["optimizer"],
        gradients=gradients,
        activations=int(_saved(e, place, layers, part)),
        working=int(_working(e, place, layers, part) + _copies(state["parameters"], e)),
        compute=compute,
        layers=in_layers,
        links=on_links,
        exposed=exposed,
        bubble=schedule.bubble if schedule else 0.0,
        offloaded="optimizer" in place.offload,
    )


def _compute(
    e: Experiment,
    place: Place,
    where: Slice,
    layers: list[_Sizes],
    part: float,
    again: tuple[float, float],
    shares: tuple[float, float],
    parameters: int,
) -> tuple[float, float]:
    """Seconds of products, memory and the optimizer, and those of them in layers, for `part` tokens
    in each micro-batch."""
    mesh, chip, dim, tensor = place.mesh, where.chip, e.model.dim, place.mesh.tensor
    flops, hbm = MATMUL * chip.flops / chip.devices, HBM * chip.hbm_bandwidth / chip.devices
    seconds = 0.0
    for layer in layers:
        products = 2 * part * layer.active / tensor * (3 + again[0])
        # Where experts lie on other devices, the backward pass fetches rows anew in any case.
        routed = max(again) if mesh.expert == 1 else 1.0
        products += 2 * part * layer.routed / tensor * (3 + routed)
        tiles = products * 2 / TILE  # bytes: both operands, two a number
        hidden = HIDDEN * (layer.hidden + layer.chosen) / tensor
        traffic = 2 * part * ((WIDE + ROWS * layer.rows) * dim + hidden)
        seconds += max(products / flops, tiles / hbm) + 4 * traffic / hbm
        attention = 4 * part * layer.heads * layer.keys / tensor
        peak = chip.flops / chip.devices
        seconds += in_attention(attention, 1 + again[1], layer.head_dim, shares) / peak
    seconds *= place.microbatches / mesh.pipe
    tokens = place.microbatches * part / mesh.pipe
    vocabulary = 3 * 2 * tokens * dim * e.model.vocab / tensor / flops
    # The optimizer reads and writes float32 weight and moments and reads a gradient.
    return seconds + vocabulary + 28 * parameters / 4 / hbm, seconds


def _working(e: Experiment, place: Place, layers: list[_Sizes], part: float) -> float:
    """Bytes that one layer's backward pass, or the vocabulary's, needs for a while."""
    dim, tensor = e.model.dim, place.mesh.tensor
    widest = max(layer.hidden + layer.chosen for layer in layers) / tensor
    largest = max(layer.active + layer.experts / place.mesh.expert for layer in layers) / tensor
    rows = max(layer.rows for layer in layers)
    layer = 2 * part * (7 * widest + (8 + 6 * rows) * dim) + 3 * 2 * largest
    # Of a chunk of words: logits and the matrix's gradient, in float32 and in bfloat16; and the
    # gradient of the hidden states in float32.
    vocabulary = 12 * 2**27 + 4 * part * dim
    return max(layer, vocabulary)


def in_attention(
    flops: float, forwards: float, head_dim: int, shares: tuple[float, float]
) -> float:
    """What attention takes, in FLOPs at the peak: `flops` forward, so many times, and the backward
    pass, which computes the scores anew: five products for two."""
    forward, both = (min(MATMUL, share * head_dim / 128) for share in shares)
    return flops * (3.5 / both + (forwards - 1) / forward)


class Attention(NamedTuple):
    """Scores and values of all layers, forward, per token: 4 heads head_dim keys in each."""

    flops: float
    head_dim: int


def attention_of(e: Experiment) -> Attention:
    """The work of its attention."""
    layers = [_sizes(e, block) for block in e.model.layout.blocks]
    flops = sum(4 * layer.heads * layer.keys for layer in layers)
    return Attention(flops, min(layer.head_dim for layer in layers))


def grouped_flops(e: Experiment) -> float:
    """Of one product of an MoE's chosen experts, per token."""
    ffns = (block.ffn for block in e.model.layout.blocks)
    return max(
        (
            2 * f.experts_per_token * e.model.dim * f.hidden
            for f in ffns
            if hasattr(f, "experts_per_token")
        ),
        default=0,
    )


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
    matrices = 3 if isinstance(ffn, model.MoE | model.SwiGLU | model.GeGLU) else 2
    one, rows, hidden = matrices * dim * ffn.hidden, 0, ffn.hidden
    if isinstance(ffn, model.MoE):
        rows, hidden = ffn.experts_per_token, ffn.shared.hidden if ffn.shared else 0
    return _Sizes(
        active=attention + matrices * dim * hidden,
        experts=ffn.experts * one if rows else 0,
        routed=rows * one,
        rows=rows,
        heads=heads,
        head_dim=a.head_dim,
        kv=kv,
        hidden=hidden,
        chosen=rows * ffn.hidden,
        keys=keys,
    )


def _again(place: Place) -> tuple[float, float]:
    """Forward passes of products, and of attention, that the backward pass repeats."""
    if isinstance(place.remat, str) and place.remat != "attention":
        return FORWARDS[place.remat]
    return 1.0, 0.0 if "attention" in place.remat else 1.0


def _saved(e: Experiment, place: Place, layers: list[_Sizes], part: float) -> float:
    """Bytes kept for the backward pass. A pipeline keeps them of every iteration."""
    size, tensor, dim = (2 if _half(e) else 4), place.mesh.tensor, e.model.dim
    stream = dim / (tensor if place.mesh.pipe == 1 else 1)
    given = 0 if "layers" in place.offload else stream  # what enters a layer

    def width(layer: _Sizes, remat: str | tuple[str, ...]) -> float:
        # What the names of lm.parallel.mesh.KEPT stand for; the log of each softmax is left out.
        named = {
            "attention": layer.heads / tensor,
            "qkv": (layer.heads + 2 * layer.kv) / tensor,
            "attention_out": stream,
            "ffn_hidden": 2 * layer.hidden / tensor,
        }
        if not isinstance(remat, str):
            return given + sum(named[name] for name in remat)
        if remat == "attention":
            return given + named["attention"]
        kept = given
        if remat in ("dots", "none"):
            kept += sum(named.values())
        if remat == "none":
            kept += (layer.heads + layer.hidden) / tensor + 2 * stream + layer.rows * dim
            kept += 3 * layer.chosen / tensor if place.mesh.expert == 1 else 0
        return kept

    total = size * part * sum(width(layer, place.remat) for layer in layers)
    schedule = e.pipeline_at(place)
    if schedule is None:
        return total
    if place.remat != "stage":
        return total * schedule.depth * schedule.iterations / schedule.layers
    # The input of a group in each iteration, and for a while all of one group's layers.
    group = max(width(layer, "none") for layer in layers) * schedule.depth
    return size * part * (stream * schedule.iterations + group)


def _links(
    e: Experiment,
    place: Place,
    where: Slice,
    layers: list[_Sizes],
    part: float,
    again: float,
    gradients: int,
) -> tuple[float, float]:
    """(seconds of all collectives, those of them that products wait for)."""
    mesh, size = place.mesh, 2 if _half(e) else 4
    torus = _Torus(place, where)
    total = exposed = 0.0
    for layer in layers:
        # Gathered forward and backward, and their gradients summed.
        weights = size * (layer.active + layer.experts / mesh.expert) / mesh.tensor / mesh.pipe
        total += 3 * place.microbatches * torus.gather("fsdp", weights)
        stream = size * part * e.model.dim * place.microbatches / mesh.pipe
        tensor = (4 + 2 * again) * 2 * torus.gather("tensor", stream)
        # To the experts and back; backward there, with gradients, and those back.
        expert = 5 * torus.exchange("expert", stream * layer.rows)
        # Keys and values go round, and backward with their gradients.
        keys = size * part * 2 * layer.kv / mesh.tensor * place.microbatches / mesh.pipe
        context = (3 + again) * torus.gather("context", keys * mesh.context)
        total += tensor + expert + context
        exposed += tensor + expert + context / 2
    if schedule := e.pipeline_at(place):
        # Forward and backward, what passes to the next stage and what waits; the first is awaited.
        packets = 2 * schedule.iterations * torus.permute("pipe", size * part * e.model.dim)
        total, exposed = total + 2 * packets, exposed + packets
    total += 2 * torus.gather("data", gradients)
    return total + (links.HOP * len(layers) if mesh.size > 1 else 0), exposed


class _Torus:
    """How fast the axes of a mesh are. The dimensions of a slice's torus are shared out over them
    by the logarithm of their sizes, as a mesh is laid over a torus, but an axis has one at least;
    what lies between slices goes through the network."""

    def __init__(self, place: Place, where: Slice):
        chip, across = where.chip, place.mesh.across(where.count)
        self._across = dict(zip(AXES, across, strict=True))
        self._within = {a: getattr(place.mesh, a) // self._across[a] for a in AXES}
        bits = math.log2(math.prod(self._within.values())) or 1
        self._dims = {a: max(chip.dims * math.log2(n) / bits, 1) for a, n in self._within.items()}
        link, rings = chip.link / chip.devices, all(where.rings())
        self._network = chip.network / chip.devices
        self._link = {a: (2 if rings else 1) * dims * link for a, dims in self._dims.items()}
        self._middle = (8 if rings else 4) * link

    def gather(self, axis: str, nbytes: float) -> float:
        """Seconds until every device along the axis has all of an array, or its sum in parts."""
        n, slices = self._within[axis], self._across[axis]
        between = nbytes / n * (slices - 1) / slices / self._network
        return nbytes * (n - 1) / n / self._link[axis] + between

    def exchange(self, axis: str, nbytes: float) -> float:
        """Seconds until every device along the axis has sent an array, a part to each of them: what
        crosses the middle of the torus takes longest."""
        n, slices = self._within[axis], self._across[axis]
        between = nbytes * (slices - 1) / slices / self._network
        return nbytes * (n ** (1 / self._dims[axis]) if n > 1 else 0) / self._middle + between

    def permute(self, axis: str, nbytes: float) -> float:
        """Seconds to give an array to the next device along the axis."""
        return nbytes / (self._network if self._across[axis] > 1 else self._link[axis])
