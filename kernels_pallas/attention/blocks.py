"""Block sizes of the TPU attention kernels, from a table of compiled schedules."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES = 128


class Sizes(NamedTuple):
    """Block sizes of one kernel call.

    rows    queries of one head in a block
    heads   query heads in a block; they share one key/value head
    block   keys in vector memory
    wide    keys computed at a time where all are visible
    narrow  keys computed at a time where a mask applies
    """

    rows: int
    heads: int
    block: int
    wide: int
    narrow: int

    @property
    def together(self) -> int:
        """Heads whose queries share one mask: several where the rows of one do not fill lanes."""
        return self.heads if self.rows % LANES else 1


class Cut(NamedTuple):
    """Limits: `total` rows of all heads together, `rows` of one head, `wide` keys at a time."""

    total: int
    rows: int
    wide: int


# Best settings tried, by chip and by head width rounded up to lanes; kernels_pallas/README.md
# lists the measurements. None is the default for other chips.
FORWARD = {
    ("v6e", 128): Cut(2048, 512, 512),
    ("v6e", 256): Cut(2048, 512, 512),
    ("tpu7x", 128): Cut(2048, 512, 512),
    ("tpu7x", 256): Cut(2048, 512, 512),
    (None, 128): Cut(1024, 256, 1024),
    (None, 256): Cut(1024, 256, 512),
}
BACKWARD = {
    (None, 128): Cut(1024, 256, 512),
    (None, 256): Cut(1024, 256, 256),
}
# Keys computed at a time under a mask.
NARROW = 256
# Bytes of keys in vector memory. With values and double buffering this makes 32 MiB forward;
# backward, with float32 gradients and their output buffers, 48 MiB. With few queries, as in
# decoding, fetching keys takes the time; a smaller limit avoids fetching invisible ones.
FORWARD_BYTES, FEW_BYTES, BACKWARD_BYTES = 8 * 2**20, 2**20, 4 * 2**20
KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
         "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"}  # fmt: skip


def chip() -> str | None:
    """Kind of TPU that is traced for: of the surrounding mesh, else of this machine. None if it is
    not in KINDS."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = described.device_kind if described else jax.devices()[0].device_kind
    return KINDS.get(kind)


def forward_sizes(t: int, s: int, groups: int, width: int, dtype: jnp.dtype) -> Sizes:
    """Sizes for T queries, S keys, `groups` query heads per key/value head, heads `width` wide."""
    cut = _cut(FORWARD, width, dtype)
    few = t < LANES
    rows, heads = _few(t, groups, cut) if few else _rows(t, groups, cut)
    most = (FEW_BYTES if few else FORWARD_BYTES) // _bytes(width, dtype)
    return Sizes(rows, heads, *_keys(s, cut, most))


def backward_sizes(t: int, s: int, groups: int, width: int, dtype: jnp.dtype) -> Sizes:
    """Sizes of the backward kernel; arguments as in `forward_sizes`."""
    cut = _cut(BACKWARD, width, dtype)
    most = BACKWARD_BYTES // _bytes(width, dtype)
    return Sizes(*_rows(t, groups, cut), *_keys(s, cut, most))


def _cut(table, width, dtype):
    lanes = LANES if width <= LANES else 2 * LANES
    cut = table.get((chip(), lanes)) or table[None, lanes]
    if jnp.dtype(dtype).itemsize == 2 and width <= 2 * LANES:
        return cut
    return Cut(cut.total // 2, cut.rows, min(cut.wide, 512))


def _rows(t, groups, cut):
    """(rows, heads) of `Sizes`."""
    heads = max(d for d in range(1, groups + 1) if groups % d == 0 and d * LANES <= cut.total)
    rows = cut.rows if heads > 1 else 1024
    rows = min(rows, cut.total // heads // LANES * LANES, -(-t // LANES) * LANES)
    return rows, heads


def _few(t, groups, cut):
    """(rows, heads) for fewer queries than lanes, as in decoding: several heads fill the lanes."""

    def rows(heads):
        # A tile packs 16 rows of bfloat16.
        step = LANES // math.gcd(LANES // 16, heads)
        return -(-t // step) * step

    fits = [d for d in range(2, groups + 1) if groups % d == 0 and d * rows(d) <= cut.total]
    heads = max(fits, default=1)
    return rows(heads), heads


def _bytes(width, dtype):
    """Bytes of one key in vector memory."""
    return -(-width // LANES) * LANES * jnp.dtype(dtype).itemsize


def _keys(s, cut, most):
    """(block, wide, narrow) of `Sizes`, with at most `most` keys in a block."""
    narrow = min(NARROW, -(-s // LANES) * LANES)
    wide = min(cut.wide, -(-s // narrow) * narrow)
    spans = -(-s // most)
    return -(-s // (spans * wide)) * wide, wide, narrow
