"""Estimates memory and time of a step without the compiler, from the declaration and the chip's
constants.

Time is a roofline: matmuls at MATMUL of the peak, element-wise work and operands of kernels at HBM
of the memory bandwidth, collectives at the speed of the links. The two fractions are assumptions,
the same for every chip and model.
"""

import math
from typing import NamedTuple

from lm import model, trees
from lm.experiment import Experiment
from lm.folders import models_of
from lm.parallel import sharding
from lm.parallel.mesh import AXES, Place
from lm.planning import links, show
from lm.planning.slices import Slice
from lm.training import ALL

MATMUL = 0.90  # fraction of peak FLOP/s in large matmuls: assumed
HBM = 0.85  # fraction of memory bandwidth in streaming: assumed
# Fraction of peak FLOP/s in attention kernels with head width 128: (forward, forward and backward
# together). Softmax takes the rest, as counted in the compiled kernels (kernels_pallas/README.md):
# the vector units need the same time per score for any head width.
ATTENTION = {
    "v5e": (0.85, 0.88), "v5p": (0.84, 0.88), "v6e": (0.44, 0.45), "tpu7x": (0.47, 0.47),
}  # fmt: skip
# A matmul reads its operands once per tile of its result. Side of a square tile whose float32
# accumulator and operands fill the 16 MiB of vector memory that a program gets by default.
TILE = 1024

# Reads and writes of a layer's activations outside matmuls in the forward pass, in arrays: WIDE of
# the model width (norms, rotary embedding, residuals), HIDDEN of the feed-forward width (the gate),
# ROWS of the model width per routed expert (rows are sorted, sent, weighted, returned and summed,
# as in a compiled step).
WIDE, HIDDEN, ROWS = 10, 4, 30

# Fraction of the forward pass that the backward pass recomputes: (weight matmuls, attention).
RECOMPUTE = {"none": (0.0, 0.0), "dots": (0.0, 0.0), "block": (1.0, 1.0), "stage": (1.0, 1.0)}


class Estimate(NamedTuple):
    """Estimate per device: memory in bytes, time of a step in seconds.

    activations  saved for the backward pass
    working      temporaries of one layer, and the copy of the parameters in the compute dtype
    compute      matmuls and memory traffic, without pipeline bubbles
    layers       the part of `compute` in layers
    links        all collectives
    exposed      the part of `links` that matmuls wait for
    bubble       idle fraction of the time in layers
    offloaded    whether the optimizer state is in host memory
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
        if self.offloaded:  # the optimizer state is on the device during the update only
            return self.parameters + self.gradients + max(passes, self.optimizer)
        return self.state + self.gradients + passes

    @property
    def seconds(self) -> float:
        """Time of a step. All-gathers of weights and sums of gradients overlap with matmuls;
        `exposed` collectives do not."""
        idle = self.layers * self.bubble / (1 - self.bubble)
        overlapped = self.links - self.exposed
        return max(self.compute + idle, overlapped) + self.exposed


class _Sizes(NamedTuple):
    """Sizes of one unsharded layer.

    dense            weights of attention, dense feed-forward and shared experts
    experts, routed  weights of all routed experts, and of those that process a token
    rows             routed experts per token
    heads, kv        widths of queries, and of keys or values
    head_dim         width of one head
    hidden, chosen   feed-forward width of the dense part, and of a token's routed experts together
    keys             keys that a query attends to, on average
    """

    dense: float
    experts: float
    routed: float
    rows: int
    heads: int
    head_dim: int
    kv: int
    hidden: float
    chosen: float
    keys: float


def state_at(e: Experiment, place: Place) -> dict[str, int]:
    """Bytes per device of parameters, gradients and optimizer state. Depends only on the mesh and
    circular_repeats of the place."""
    return show.memory(e, place.mesh.abstract(), sharding.rules_for(place))


def estimate(
    e: Experiment,
    place: Place,
    tpu_slice: Slice,
    *,
    recompute: float | None = None,
    attention: tuple[float, float] | None = None,
    state: dict[str, int] | None = None,
) -> Estimate:
    """Estimates a step at a place of a TPU slice.

    Args:
        recompute: fraction of the forward pass that the backward pass recomputes (default: by the
            remat of the place).
        attention: fractions of the peak in attention kernels (default: those of ATTENTION).
        state: result of `state_at`, if already computed.
    """
    mesh = place.mesh
    layers = [_sizes(e, block) for block in e.model.layout.blocks]
    ways = mesh.data * mesh.fsdp * mesh.expert * mesh.context
    device_tokens = e.batch.sequences * e.batch.length / ways  # through each stage of a pipeline
    tokens = device_tokens / place.microbatches
    state = state or state_at(e, place)
    schedule = e.pipeline_at(place)
    recomputed = _recomputed(place) if recompute is None else (recompute, recompute)
    first = _first_passes(e, place)
    updated = state["parameters"] * _trained_share(e)
    half = _half(e) if place.microbatches == 1 else place.accumulate == "bfloat16"
    gradients = state["gradients"] // (2 if half else 1)
    fractions = attention or ATTENTION[tpu_slice.generation]
    compute, in_layers = _compute(
        e, place, tpu_slice, layers, tokens, recomputed, first, fractions, updated
    )
    on_links, exposed = _links(e, place, tpu_slice, layers, tokens, recomputed[0], first, gradients)
    return Estimate(
        parameters=state["parameters"] + state.get("models", 0),
        optimizer=state["optimizer"],
        gradients=gradients,
        activations=int(_activations(e, place, layers, tokens)),
        working=int(_working(e, place, layers, tokens) + _cast_bytes(state["parameters"], e)),
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
    tpu_slice: Slice,
    layers: list[_Sizes],
    tokens: float,
    recomputed: tuple[float, float],
    first: float,
    fractions: tuple[float, float],
    updated: float,
) -> tuple[float, float]:
    """(seconds of matmuls, memory traffic and optimizer; those of them in layers), for `tokens` per
    device and micro-batch, with `first` forward passes besides the one that is differentiated, and
    `updated` bytes of parameters that the optimizer changes."""
    mesh, chip, dim, tensor = place.mesh, tpu_slice.chip, e.model.dim, place.mesh.tensor
    flops, hbm = MATMUL * chip.flops / chip.devices, HBM * chip.hbm_bandwidth / chip.devices
    seconds, passes = 0.0, 2 + _trained_share(e) + first
    for layer in layers:
        matmuls = 2 * tokens * layer.dense / tensor * (passes + recomputed[0])
        # With expert parallelism the backward pass always recomputes rows of other devices.
        routed = max(recomputed) if mesh.expert == 1 else 1.0
        matmuls += 2 * tokens * layer.routed / tensor * (passes + routed)
        operands = matmuls * 2 / TILE  # bytes: two operands of two bytes a number
        hidden = HIDDEN * (layer.hidden + layer.chosen) / tensor
        traffic = 2 * tokens * ((WIDE + ROWS * layer.rows) * dim + hidden)
        seconds += max(matmuls / flops, operands / hbm) + (4 + first) * traffic / hbm
        attention = 4 * tokens * layer.heads * layer.keys / tensor
        peak = chip.flops / chip.devices
        forwards = 1 + first + recomputed[1]
        seconds += attention_flops_at_peak(attention, forwards, layer.head_dim, fractions) / peak
    seconds *= place.microbatches / mesh.pipe
    stage_tokens = place.microbatches * tokens / mesh.pipe
    # The passes for statistics have no logits.
    logits = 2 + _trained_share(e) + _other_passes(e)
    vocabulary = logits * 2 * stage_tokens * dim * e.model.vocab / tensor / flops
    # The optimizer reads and writes float32 weights and moments, and reads gradients.
    return seconds + vocabulary + 28 * updated / 4 / hbm, seconds


def _working(e: Experiment, place: Place, layers: list[_Sizes], tokens: float) -> float:
    """Bytes of temporaries in the backward pass of one layer, or of the output matrix if larger."""
    dim, tensor = e.model.dim, place.mesh.tensor
    widest = max(layer.hidden + layer.chosen for layer in layers) / tensor
    largest = max(layer.dense + layer.experts / place.mesh.expert for layer in layers) / tensor
    rows = max(layer.rows for layer in layers)
    layer = 2 * tokens * (7 * widest + (8 + 6 * rows) * dim) + 3 * 2 * largest
    # A chunk of the vocabulary: logits and gradient of the output matrix, in float32 and bfloat16.
    # And the gradient of the hidden states in float32.
    vocabulary = 12 * 2**27 + 4 * tokens * dim
    return max(layer, vocabulary)


def attention_flops_at_peak(
    flops: float, forwards: float, head_dim: int, fractions: tuple[float, float]
) -> float:
    """Time of attention in FLOPs at peak: `forwards` forward passes of `flops` each, and a backward
    pass, which recomputes scores: five matmuls where the forward pass has two."""
    forward, both = (min(MATMUL, fraction * head_dim / 128) for fraction in fractions)
    return flops * (3.5 / both + (forwards - 1) / forward)


class Attention(NamedTuple):
    """Forward FLOPs per token of attention in all layers, 4 x heads x head_dim x keys each, and the
    smallest head width."""

    flops: float
    head_dim: int


def attention_of(e: Experiment) -> Attention:
    """Attention work of an experiment."""
    layers = [_sizes(e, block) for block in e.model.layout.blocks]
    flops = sum(4 * layer.heads * layer.keys for layer in layers)
    return Attention(flops, min(layer.head_dim for layer in layers))


def grouped_flops(e: Experiment) -> float:
    """FLOPs per token of one matmul with all routed experts of that token, of the largest MoE
    layer; 0 without one."""
    ffns = (block.ffn for block in e.model.layout.blocks)
    return max(
        (
            2 * f.experts_per_token * e.model.dim * f.hidden
            for f in ffns
            if hasattr(f, "experts_per_token")
        ),
        default=0,
    )


def _trained_share(e: Experiment) -> float:
    """Fraction of the parameters that train. The backward pass has no products for the gradients
    of the others."""
    if e.trained == ALL:
        return 1.0
    trained = trees.partition(model.shapes(e.model), e.trained)[0]
    return trees.count(trained) / model.parameter_count(e.model).total


def _other_passes(e: Experiment) -> float:
    """Forward passes of the objective's other models, in passes of this model."""
    own = model.flops(e.model, e.batch.length)
    return sum(
        1.0 if config is None else model.flops(config, e.batch.length) / own
        for config in models_of(e).values()
    )


def _first_passes(e: Experiment, place: Place) -> float:
    """Forward passes besides the one that is differentiated: for the statistics of the whole batch
    (see lm/training/gradient.py), and of the objective's other models."""
    balances = [getattr(block.ffn, "balance", None) for block in e.model.layout.blocks]
    balanced = any(getattr(balance, "over", None) == "batch" for balance in balances)
    return _other_passes(e) + int(balanced and place.microbatches > 1 and place.mesh.pipe == 1)


def _half(e: Experiment) -> bool:
    """Whether the compute dtype has two bytes."""
    return e.precision.compute != "float32"


def _cast_bytes(parameters: int, e: Experiment) -> int:
    """Bytes of the copy of the parameters in the compute dtype."""
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
    expert, rows, hidden = matrices * dim * ffn.hidden, 0, ffn.hidden
    if isinstance(ffn, model.MoE):
        rows, hidden = ffn.experts_per_token, ffn.shared.hidden if ffn.shared else 0
    return _Sizes(
        dense=attention + matrices * dim * hidden,
        experts=ffn.experts * expert if rows else 0,
        routed=rows * expert,
        rows=rows,
        heads=heads,
        head_dim=a.head_dim,
        kv=kv,
        hidden=hidden,
        chosen=rows * ffn.hidden,
        keys=keys,
    )


def _recomputed(place: Place) -> tuple[float, float]:
    """Fractions of the forward pass that are recomputed: (weight matmuls, attention)."""
    if isinstance(place.remat, str) and place.remat != "attention":
        return RECOMPUTE[place.remat]
    return 1.0, 0.0 if "attention" in place.remat else 1.0


def _activations(e: Experiment, place: Place, layers: list[_Sizes], tokens: float) -> float:
    """Bytes saved for the backward pass. A pipeline saves them in every iteration."""
    size, tensor, dim = (2 if _half(e) else 4), place.mesh.tensor, e.model.dim
    stream = dim / (tensor if place.mesh.pipe == 1 else 1)
    layer_input = 0 if "layers" in place.offload else stream

    def width(layer: _Sizes, remat: str | tuple[str, ...]) -> float:
        # The names of lm.parallel.mesh.SAVED, without the log-sum-exp of attention.
        named = {
            "attention": layer.heads / tensor,
            "qkv": (layer.heads + 2 * layer.kv) / tensor,
            "attention_out": stream,
            "ffn_hidden": 2 * layer.hidden / tensor,
        }
        if not isinstance(remat, str):
            return layer_input + sum(named[name] for name in remat)
        if remat == "attention":
            return layer_input + named["attention"]
        saved = layer_input
        if remat in ("dots", "none"):
            saved += sum(named.values())
        if remat == "none":
            saved += (layer.heads + layer.hidden) / tensor + 2 * stream + layer.rows * dim
            saved += 3 * layer.chosen / tensor if place.mesh.expert == 1 else 0
        return saved

    total = size * tokens * sum(width(layer, place.remat) for layer in layers)
    schedule = e.pipeline_at(place)
    if schedule is None:
        return total
    if place.remat != "stage":
        return total * schedule.depth * schedule.iterations / schedule.layers
    # The input of a group in each iteration, and temporarily everything of one group's layers.
    group = max(width(layer, "none") for layer in layers) * schedule.depth
    return size * tokens * (stream * schedule.iterations + group)


def _links(
    e: Experiment,
    place: Place,
    tpu_slice: Slice,
    layers: list[_Sizes],
    tokens: float,
    recomputed: float,
    first: float,
    gradients: int,
) -> tuple[float, float]:
    """(seconds of all collectives, those of them that matmuls wait for)."""
    mesh, size = place.mesh, 2 if _half(e) else 4
    torus = _Torus(place, tpu_slice)
    total = exposed = 0.0
    for layer in layers:
        # FSDP: all-gather in each forward pass and backward, reduce-scatter of gradients.
        weights = size * (layer.dense + layer.experts / mesh.expert) / mesh.tensor / mesh.pipe
        total += (3 + first) * place.microbatches * torus.gather("fsdp", weights)
        stream = size * tokens * e.model.dim * place.microbatches / mesh.pipe
        tensor = (4 + 2 * first + 2 * recomputed) * 2 * torus.gather("tensor", stream)
        # Forward: rows to experts and back. Backward: rows and gradients to experts, gradients
        # back.
        expert = (5 + 2 * first) * torus.exchange("expert", stream * layer.rows)
        # Ring attention: keys and values, in the backward pass with their gradients.
        keys = size * tokens * 2 * layer.kv / mesh.tensor * place.microbatches / mesh.pipe
        context = (3 + first + recomputed) * torus.gather("context", keys * mesh.context)
        total += tensor + expert + context
        exposed += tensor + expert + context / 2
    if schedule := e.pipeline_at(place):
        # Forward and backward: activations to the next stage (exposed), and waiting micro-batches.
        packets = 2 * schedule.iterations * torus.permute("pipe", size * tokens * e.model.dim)
        total, exposed = total + 2 * packets, exposed + packets
    total += 2 * torus.gather("data", gradients)
    return total + (links.HOP * len(layers) if mesh.size > 1 else 0), exposed


class _Torus:
    """Communication speed of mesh axes.

    An axis gets a number of torus dimensions in proportion to the logarithm of its size, at least
    one. Communication between slices goes through the network.
    """

    def __init__(self, place: Place, tpu_slice: Slice):
        chip, across = tpu_slice.chip, place.mesh.across(tpu_slice.count)
        self._across = dict(zip(AXES, across, strict=True))
        self._within = {a: getattr(place.mesh, a) // self._across[a] for a in AXES}
        bits = math.log2(math.prod(self._within.values())) or 1
        self._dims = {a: max(chip.dims * math.log2(n) / bits, 1) for a, n in self._within.items()}
        link, rings = chip.link / chip.devices, all(tpu_slice.rings())
        self._network = chip.network / chip.devices
        self._link = {a: (2 if rings else 1) * dims * link for a, dims in self._dims.items()}
        self._middle = (8 if rings else 4) * link

    def gather(self, axis: str, nbytes: float) -> float:
        """Seconds of an all-gather or reduce-scatter of an array of `nbytes` along the axis."""
        n, slices = self._within[axis], self._across[axis]
        between = nbytes / n * (slices - 1) / slices / self._network
        return nbytes * (n - 1) / n / self._link[axis] + between

    def exchange(self, axis: str, nbytes: float) -> float:
        """Seconds of an all-to-all along the axis in which every device sends `nbytes`. The links
        through the middle of the torus are the bottleneck."""
        n, slices = self._within[axis], self._across[axis]
        between = nbytes * (slices - 1) / slices / self._network
        return nbytes * (n ** (1 / self._dims[axis]) if n > 1 else 0) / self._middle + between

    def permute(self, axis: str, nbytes: float) -> float:
        """Seconds to send an array to the next device along the axis."""
        return nbytes / (self._network if self._across[axis] > 1 else self._link[axis])
