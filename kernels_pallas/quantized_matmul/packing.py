"""Quantization of weights to 8, 4 and 3 bits, and packing of 4 and 3 bits into 32-bit words.

Rounds to nearest, with one scale per column (8 bits) or per group of rows of a column (4 and 3
bits). Rows are packed in blocks of 256. The two 16-bit halves of a word hold neighbouring rows, as
in a TPU's layout of 16-bit numbers; the fields of one half hold rows far apart. Shifting and
masking a row of words therefore gives whole pairs of rows, without interleaving. With fields of b
bits, field j of half h of word r is row 16 b j + 2 r + h of the block. Fields are unsigned: 4-bit
numbers plus 8; 3-bit numbers plus 4, with the lower two bits and the upper bit in separate arrays.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

F32 = jnp.float32
BLOCK = 256
GROUPS = (32, 64, 128)


class Packed(NamedTuple):
    """Matrix [D, F] of 4-bit or 3-bit weights.

    low        int32 [D / 8, F] with 4 bits, [D / 16, F] with 3
    high       None with 4 bits, int32 [D / 32, F] with 3
    scales_gf  float32 [D / group, F]
    """

    low: jax.Array
    high: jax.Array | None
    scales_gf: jax.Array

    @property
    def bits(self) -> int:
        return 4 if self.high is None else 3

    @property
    def shape(self) -> tuple[int, int]:
        """[D, F]."""
        return self.low.shape[0] * (8 if self.high is None else 16), self.low.shape[1]

    @property
    def group(self) -> int:
        """Rows per scale."""
        return self.shape[0] // self.scales_gf.shape[0]


def quantize_int8(w_df: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (int8 [D, F], float32 scales [F]); their product is within half a scale of w."""
    top_f = jnp.max(jnp.abs(w_df.astype(F32)), axis=0)
    scales_f = jnp.where(top_f > 0, top_f, 1) / 127
    return jnp.round(w_df.astype(F32) / scales_f).astype(jnp.int8), scales_f


def pack(w_df: jax.Array, *, bits: int = 4, group: int = 128) -> Packed:
    """Quantizes w with one scale per `group` rows of a column.

    Args:
      w_df: [D, F]; D must be a multiple of 256 and of `group`.
      bits: 3 or 4.
      group: 32, 64, 128 or a multiple of 256.

    Raises:
      ValueError: an argument does not meet these conditions.
    """
    if bits not in (3, 4):
        raise ValueError(f"bits={bits} must be 3 or 4; use quantize_int8 for 8 bits.")
    if group not in GROUPS and (group < BLOCK or group % BLOCK):
        raise ValueError(f"group={group} must be 32, 64, 128 or a multiple of {BLOCK}.")
    if w_df.ndim != 2 or w_df.shape[0] % BLOCK or w_df.shape[0] % group:
        raise ValueError(
            f"w_df {w_df.shape} must be [D, F] with D a multiple of {max(BLOCK, group)}."
        )
    d, f = w_df.shape
    w_gcf = w_df.astype(F32).reshape(-1, group, f)
    top = 2 ** (bits - 1) - 1
    largest_gf = jnp.max(jnp.abs(w_gcf), axis=1)
    scales_gf = jnp.where(largest_gf > 0, largest_gf, 1) / top
    q = jnp.clip(jnp.round(w_gcf / scales_gf[:, None]), -top, top).astype(jnp.int32)
    q = q.reshape(d // BLOCK, BLOCK, f) + top + 1
    if bits == 4:
        return Packed(_fields(q, 4), None, scales_gf)
    return Packed(_fields(q & 3, 2), _fields(q >> 2, 1), scales_gf)


def _fields(q_bcf, bits):
    """Packs numbers below 2**bits, [blocks, 256, F], into words."""
    blocks, _, f = q_bcf.shape
    q = q_bcf.astype(jnp.uint32).reshape(blocks, 16 // bits, 8 * bits, 2, f)
    q = jnp.sum(q << _shifts(bits), axis=(1, 3), dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(q, jnp.int32).reshape(-1, f)


def _shifts(bits):
    """Left shift of field j of half h, [fields, 1, 2, 1]."""
    field, half = jnp.arange(16 // bits), 16 * jnp.arange(2)
    return (bits * field[:, None, None, None] + half[:, None]).astype(jnp.uint32)


def unpack(packed: Packed) -> jax.Array:
    """Returns the dequantized w_df in float32."""
    d, f = packed.shape
    if packed.bits == 4:
        q = _values(packed.low, 4) - 8
    else:
        q = _values(packed.low, 2) + 4 * _values(packed.high, 1) - 4
    q = q.reshape(-1, packed.group, f).astype(F32) * packed.scales_gf[:, None]
    return q.reshape(d, f)


def _values(words, bits):
    """Inverse of `_fields`."""
    f = words.shape[-1]
    words = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape(-1, 1, 8 * bits, 1, f)
    fields = (words >> _shifts(bits)) & (2**bits - 1)
    return fields.astype(jnp.int32).reshape(-1, BLOCK, f)
