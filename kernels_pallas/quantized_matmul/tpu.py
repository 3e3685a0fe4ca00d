"""Quantized matmuls on TPU (Mosaic): tiles of rows by blocks of columns, summed in vector memory.

Weights of 4 and 3 bits are read packed from HBM and unpacked in vector memory: a field placed under
the exponent of 128 is the bfloat16 number 128 + field. With few rows unpacking dominates; the
matmul takes these numbers as they are, and the excess, sums of x times the scales, is subtracted.
With many rows a block of columns is unpacked and scaled once for all rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.quantized_matmul.packing import BLOCK, Packed
from kernels_pallas.quantized_matmul.reference import quantize_rows
from kernels_pallas.varying import shape_like, varying_alike

F32 = jnp.float32
VMEM = 48 * 2**20
# Rows, columns and depth of a block, for 8 bits and for 4 and 3 bits with few rows.
INT8_BLOCKS = 1024, 1024, 2048
FEW_BLOCKS = 128, 512, 2048
# With many rows: bytes of a block of rows, and of unpacked columns.
ROW_BYTES, COLUMN_BYTES = 8 * 2**20, 8 * 2**20
LANES = 128


def int8_matmul(x_md: jax.Array, w_df: jax.Array, scales_f: jax.Array) -> jax.Array:
    """See op.py."""
    (m, d), f = x_md.shape, w_df.shape[1]
    high, wide, deep = _blocks(INT8_BLOCKS, m, f, d)
    q_md, scales_m1 = quantize_rows(x_md)
    q_md, w_df = (_padded(q_md, 1, deep), _padded(w_df, 0, deep))
    arrays = varying_alike(q_md, w_df, scales_m1, scales_f.astype(F32)[None])
    steps = q_md.shape[1] // deep
    return pl.pallas_call(
        partial(_int8, steps=steps),
        grid=(pl.cdiv(f, wide), pl.cdiv(m, high), steps),
        in_specs=[
            pl.BlockSpec((high, deep), lambda j, i, k: (i, k)),
            pl.BlockSpec((deep, wide), lambda j, i, k: (k, j)),
            pl.BlockSpec((high, 1), lambda j, i, k: (i, 0)),
            pl.BlockSpec((1, wide), lambda j, i, k: (0, j)),
        ],
        out_specs=pl.BlockSpec((high, wide), lambda j, i, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((high, wide), jnp.int32)],
        out_shape=shape_like((m, f), x_md.dtype, *arrays),
        compiler_params=_parameters("parallel", "parallel", "arbitrary"),
        name="int8_matmul",
    )(*arrays)


def _int8(x_ref, w_ref, row_ref, column_ref, y_ref, acc_ref, *, steps):
    k = pl.program_id(2)
    y = jax.lax.dot_general(
        x_ref[...], w_ref[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
    )

    @pl.when(k == 0)
    def _():
        acc_ref[...] = y

    @pl.when(k > 0)
    def _():
        acc_ref[...] += y

    @pl.when(k == steps - 1)
    def _():
        whole = acc_ref[...].astype(F32) * row_ref[...] * column_ref[...]
        y_ref[...] = whole.astype(y_ref.dtype)


def packed_matmul(x_md: jax.Array, packed: Packed) -> jax.Array:
    """See op.py."""
    few = x_md.shape[0] <= FEW_BLOCKS[0] and x_md.dtype == jnp.bfloat16
    return _few_rows(x_md, packed) if few else _many_rows(x_md, packed)


def _words(packed):
    return [each for each in (packed.low, packed.high) if each is not None]


def _few_rows(x_md, packed):
    (m, d), f = x_md.shape, packed.shape[1]
    _, wide, limit = _blocks(FEW_BLOCKS, m, f, d)
    group = packed.group
    # A block of weights must hold whole groups.
    least = max(BLOCK, group)
    deep = max(s for s in range(least, max(least, limit) + 1, least) if d % s == 0)
    steps = d // deep
    words = _words(packed)
    sums_kmg = jnp.sum(x_md.astype(F32).reshape(m, steps, deep // group, group), axis=3)
    sums_kmg = sums_kmg.swapaxes(0, 1)
    scales_kgf = packed.scales_gf.astype(F32).reshape(steps, -1, f)
    arrays = varying_alike(x_md, sums_kmg, scales_kgf, *words)
    return pl.pallas_call(
        partial(_few_rows_kernel, group=group, steps=steps),
        grid=(pl.cdiv(f, wide), steps),
        in_specs=[
            pl.BlockSpec((m, deep), lambda j, k: (0, k)),
            pl.BlockSpec((None, m, deep // group), lambda j, k: (k, 0, 0)),
            pl.BlockSpec((None, deep // group, wide), lambda j, k: (k, 0, j)),
            *(pl.BlockSpec((each.shape[0] // steps, wide), lambda j, k: (k, j)) for each in words),
        ],
        out_specs=pl.BlockSpec((m, wide), lambda j, k: (0, j)),
        scratch_shapes=[pltpu.VMEM((m, wide), F32)],
        out_shape=shape_like((m, f), x_md.dtype, *arrays),
        compiler_params=_parameters("parallel", "arbitrary"),
        name=f"int{packed.bits}_matmul_few_rows",
    )(*arrays)


def _few_rows_kernel(x_ref, sum_ref, scale_ref, *refs, group, steps):
    *word_refs, y_ref, acc_ref = refs
    k = pl.program_id(1)
    surplus = _excess(word_refs) * _dot(sum_ref[...], scale_ref[...])

    @pl.when(k == 0)
    def _():
        acc_ref[...] = -surplus

    @pl.when(k > 0)
    def _():
        acc_ref[...] -= surplus

    def add(c, _):
        w = _unpack(word_refs, c)
        x = x_ref[:, pl.ds(pl.multiple_of(c * BLOCK, BLOCK), BLOCK)]
        total = acc_ref[...]
        for row, size, scale in _groups(scale_ref, c, group):
            total += _dot(x[:, row : row + size], w[row : row + size]) * scale
        acc_ref[...] = total

    jax.lax.fori_loop(0, x_ref.shape[1] // BLOCK, add, None)

    @pl.when(k == steps - 1)
    def _():
        y_ref[...] = acc_ref[...].astype(y_ref.dtype)


def _many_rows(x_md, packed):
    (m, d), f = x_md.shape, packed.shape[1]
    size = x_md.dtype.itemsize
    high, wide = (
        max(LANES, most // (d * size) // LANES * LANES) for most in (ROW_BYTES, COLUMN_BYTES)
    )
    high, wide = min(high, m), min(wide, f)
    words = _words(packed)
    arrays = varying_alike(x_md, packed.scales_gf.astype(F32), *words)
    return pl.pallas_call(
        partial(_many_rows_kernel, group=packed.group),
        grid=(pl.cdiv(f, wide), pl.cdiv(m, high)),
        in_specs=[
            pl.BlockSpec((high, d), lambda j, i: (i, 0)),
            *(pl.BlockSpec((each.shape[0], wide), lambda j, i: (0, j)) for each in arrays[1:]),
        ],
        out_specs=pl.BlockSpec((high, wide), lambda j, i: (i, j)),
        scratch_shapes=[pltpu.VMEM((d, wide), x_md.dtype)],
        out_shape=shape_like((m, f), x_md.dtype, *arrays),
        compiler_params=_parameters("parallel", "arbitrary"),
        name=f"int{packed.bits}_matmul",
    )(*arrays)


def _many_rows_kernel(x_ref, scale_ref, *refs, group):
    *word_refs, y_ref, w_ref = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        def store(c, _):
            w = _unpack(word_refs, c).astype(F32) - _excess(word_refs)
            for row, size, scale in _groups(scale_ref, c, group):
                at = pl.multiple_of(c * BLOCK + row, size)
                w_ref[pl.ds(at, size)] = (w[row : row + size] * scale).astype(w_ref.dtype)

        jax.lax.fori_loop(0, w_ref.shape[0] // BLOCK, store, None)

    y_ref[...] = _dot(x_ref[...], w_ref[...]).astype(y_ref.dtype)


def _groups(scale_ref, c, group):
    """Yields (first row, rows, scales [1, columns]) of each group, or its part, in block c."""
    size = min(group, BLOCK)
    for row in range(0, BLOCK, size):
        yield row, size, scale_ref[pl.ds(jax.lax.div(c * BLOCK + row, group), 1)]


def _excess(word_refs):
    """Number by which an unpacked weight is too large."""
    return 128 + (8 if len(word_refs) == 1 else 4)


def _unpack(word_refs, c):
    """Weights of block c plus `_excess`, [256, columns] in bfloat16."""
    return (_unpack4 if len(word_refs) == 1 else _unpack3)(*word_refs, c)


def _dot(a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == F32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=F32)


# Repeated in both halves of a word: bfloat16 128, and masks of fields of 1, 2 and 4 bits.
_128, _BIT, _TWO, _FOUR = 0x43004300, 0x00010001, 0x00030003, 0x000F000F


def _rows_of_words(ref, c, count):
    return ref[pl.ds(pl.multiple_of(c * count, count), count)]


def _unpack4(low_ref, c):
    low = _rows_of_words(low_ref, c, 32)
    parts = [_shifted(low, 4 * j) & _FOUR | _128 for j in range(4)]
    return pltpu.bitcast(jnp.concatenate(parts), jnp.bfloat16)


def _unpack3(low_ref, high_ref, c):
    low, high = _rows_of_words(low_ref, c, 16), _rows_of_words(high_ref, c, 8)
    parts = []
    for j in range(16):
        pair = low[:8] if j % 2 == 0 else low[8:]
        parts.append(
            _shifted(pair, 2 * (j // 2)) & _TWO | _shifted(high, j - 2) & (4 * _BIT) | _128
        )
    return pltpu.bitcast(jnp.concatenate(parts), jnp.bfloat16)


def _shifted(words, right):
    if right < 0:
        return words << -right
    return jax.lax.shift_right_logical(words, right) if right else words


def _blocks(limits, m, f, d):
    """(rows, columns, depth) of a block; the full side where it is below the limit."""
    high, wide, deep = limits
    return min(high, m), f if f <= wide else wide, d if d <= deep else deep


def _padded(x, axis, multiple):
    """x zero-padded along `axis` to a multiple of `multiple`."""
    short = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)]) if short else x


def _parameters(*semantics):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM)
