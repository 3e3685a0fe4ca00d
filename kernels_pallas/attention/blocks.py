"""How large the TPU kernels' blocks are: a table from compiled schedules, and a rule beside it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES = 128


class Sizes(NamedTuple):
    """How the arrays are cut: `rows` queries of `heads` query heads (of one key/value head) meet
    `block` keys in memory, `wide` at a time or, where a mask cuts, `narrow`."""

    rows: int
    heads: int
    block: int
    wide: int
    narrow: int

    @property
    def together(self) -> int:
        """How many heads' queries lie beside each other in one mask: those that fill lanes."""
        return self.heads if self.rows % LANES else 1


class Cut(NamedTuple):
    """At most `total` rows of all heads together, `rows` of one, and `wide` keys at a time."""

    total: int
    rows: int
    wide: int


# The best of the settings tried for a chip, by head width up to so many lanes; what was tried and
# found is in kernels_pallas/README.md. None stands for chips that have no row of their own.
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
# Keys that a mask may cut.
NARROW = 256
# Keys in memory at a time: as many as take so many bytes. With the values, and the next of both,
# they are 32 MiB forward; backward, with the gradients, summed in float32 and on their way out, 48.
# Few queries wait for their keys, so that those that they do not see had better not be fetched.
FORWARD_BYTES, FEW_BYTES, BACKWARD_BYTES = 8 * 2**20, 2**20, 4 * 2**20
KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
         "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"}  # fmt: skip


def chip() -> str | None:
    """The kind of TPU that is traced for, if that can be told: that of the surrounding mesh, or
    this machine's."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = described.device_kind if described else jax.devices()[0].device_kind
    return KINDS.get(kind)


def forward_sizes(t: int, s: int, groups: int, width: int, dtype: jnp.dtype) -> Sizes:
    """For T queries, S keys, `groups` query heads to a key/value head."""
    cut = _cut(FORWARD, width, dtype)
    few = t < LANES
    rows, heads = _few(t, groups, cut) if few else _rows(t, groups, cut)
    most = (FEW_BYTES if few else FORWARD_BYTES) // _bytes(width, dtype)
    return Sizes(rows, heads, *_keys(s, cut, most))


def backward_sizes(t: int, s: int, groups: int, width: int, dtype: jnp.dtype) -> Sizes:
    """As `forward_sizes`."""
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
    """The rows and heads of `Sizes`."""
    heads = max(d for d in range(1, groups + 1) if groups % d == 0 and d * LANES <= cut.total)
    rows = cut.rows if heads > 1 else 1024
    rows = min(rows, cut.total // heads // LANES * LANES, -(-t // LANES) * LANES)
    return rows, heads


def _few(t, groups, cut):
    """The same for fewer queries than lanes, as in decoding: several heads fill them."""

    def rows(heads):
        # Rows of bfloat16 are packed by 16 in a tile.
        step = LANES // math.gcd(LANES // 16, heads)
        return -(-t // step) * step

    fits = [d for d in range(2, groups + 1) if groups % d == 0 and d * rows(d) <= cut.total]
    heads = max(fits, default=1)
    return rows(heads), heads


def _bytes(width, dtype):
    """What a key takes in memory."""
    return -(-width // LANES) * LANES * jnp.dtype(dtype).itemsize


def _keys(s, cut, most):
    """The block (of at most so many keys), wide and narrow of `Sizes`."""
    narrow = min(NARROW, -(-s // LANES) * LANES)
    wide = min(cut.wide, -(-s // narrow) * narrow)
    spans = -(-s // most)
    return -(-s // (spans * wide)) * wide, wide, narrow
