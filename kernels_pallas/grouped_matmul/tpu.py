"""Grouped matmul on TPU (Mosaic): multiplies tiles of rows by the matrices of their groups.

A sorted list of (tile, group) pairs, computed beforehand, drives the fetches (MegaBlocks,
arXiv:2211.15841). Work is proportional to the rows: a matrix is read once for all of its tiles, and
only tiles shared by several groups are masked. Rows past the last group form an extra group, E,
whose result is zero.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.varying import shape_like, varying_alike

F32 = jnp.float32
# Limit of vector memory for a kernel (v5p and tpu7x have 64 MiB per core).
VMEM = 48 * 2**20
# Block sizes for 2-byte numbers; half for 4-byte numbers.
#   ROWS             rows of a tile
#   DEEP             longest contracted side summed at once
#   WEIGHTS          most weights in a block; up to a depth of DEEP, a group's block stays in place
#                    for all of its rows
#   WIDE             widest block of outputs
#   BLOCK_D, BLOCK_F sides of a block of the weight gradient
ROWS, DEEP, WEIGHTS, WIDE, BLOCK_D, BLOCK_F = 1024, 4096, 3 * 2**20, 2048, 2048, 1408
# Rows multiplied at once, and summed at once in the weight gradient. Rows of other groups in a tile
# are skipped in parts of this size.
PART, SUM_PART = 128, 256
LANES = 128


class Pairs(NamedTuple):
    """Pairs of a tile and a group. Pair i is the tile of rows from tile_w[i] * size on and group
    group_w[i], whose rows are start_w[i]..end_w[i]-1. Pairs from `count` on are unused."""

    group_w: jax.Array
    tile_w: jax.Array
    start_w: jax.Array
    end_w: jax.Array
    count: jax.Array


def pairs(group_sizes_e: jax.Array, rows: int, size: int, every_group: bool) -> Pairs:
    """All pairs, sorted. With `every_group`, empty groups get a pair too and group E gets none;
    otherwise every row is in a pair."""
    sizes = group_sizes_e.astype(jnp.int32)
    if not every_group:
        sizes = jnp.append(sizes, rows - sizes.sum())
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    tiles = jnp.where(sizes > 0, (ends - 1) // size - starts // size + 1, int(every_group))
    pair_ends = jnp.cumsum(tiles)
    w = jnp.arange(pl.cdiv(rows, size) + sizes.size)
    group_w = jnp.searchsorted(pair_ends, w, side="right", method="compare_all")
    group_w = jnp.minimum(group_w, sizes.size - 1).astype(jnp.int32)
    tile_w = starts[group_w] // size + w - (pair_ends - tiles)[group_w]
    tile_w = jnp.clip(tile_w, 0, pl.cdiv(rows, size) - 1)
    return Pairs(group_w, tile_w, starts[group_w], ends[group_w], pair_ends[-1])


def block(width: int, limit: int) -> int:
    """Width of equal blocks of about `limit` at most: all of `width`, or whole lanes."""
    if width <= limit:
        return width
    return pl.cdiv(pl.cdiv(width, pl.cdiv(width, limit)), LANES) * LANES


def divided(width: int, limit: int) -> int:
    """As `block`, with at least two blocks where possible: v5p has two cores to share them, and on
    other chips reading the rows once more costs less than that gains."""
    return block(width, limit if width <= LANES else min(limit, pl.cdiv(width, 2)))


def depth(width: int, limit: int) -> int:
    """Longest contracted part summed at once: all of `width`, or a divisor in whole lanes."""
    if width <= limit:
        return width
    return max(d for d in range(LANES, limit + 1, LANES) if width % d == 0)


def tile_rows(rows: int, part: int, limit: int) -> int:
    """Rows of a tile: whole parts, or all rows if they fit into one part."""
    return rows if rows <= part else min(limit, pl.cdiv(rows, part) * part)


def product(
    x_md: jax.Array,
    w_edf: jax.Array,
    group_sizes_e: jax.Array,
    scales_ef: jax.Array | None = None,
    transposed: bool = False,
) -> jax.Array:
    """Returns y [M, F]; `transposed` maps x [M, F] to y [M, D]. Int8 weights are multiplied in x's
    dtype; `scales_ef` multiplies whatever has their F axis: the result, or x if `transposed`."""
    (rows, inner), outer = x_md.shape, w_edf.shape[1 if transposed else 2]
    share = 2 / x_md.dtype.itemsize
    if inner > share * DEEP and inner % LANES:
        x_md, w_edf, scales_ef = _padded(x_md, w_edf, scales_ef, transposed)
        inner = x_md.shape[1]
    size, deep = tile_rows(rows, PART, int(share * ROWS)), depth(inner, int(share * DEEP))
    wide = divided(outer, min(WIDE, int(share * WEIGHTS) // deep))
    groups = w_edf.shape[0]
    tile_pairs = pairs(group_sizes_e, rows, size, every_group=False)
    steps = inner // deep

    def matrix(g):
        return jnp.minimum(g, groups - 1)

    def w_at(j, i, k, group_w, *_):
        return (matrix(group_w[i]), j, k) if transposed else (matrix(group_w[i]), k, j)

    in_specs = [
        pl.BlockSpec((size, deep), lambda j, i, k, _, tile_w, *__: (tile_w[i], k)),
        pl.BlockSpec((None, wide, deep) if transposed else (None, deep, wide), w_at),
    ]
    arrays = [x_md, w_edf]
    if scales_ef is not None:
        width = deep if transposed else wide
        in_specs.append(
            pl.BlockSpec(
                (None, 1, width),
                lambda j, i, k, group_w, *_: (matrix(group_w[i]), 0, k if transposed else j),
            )
        )
        arrays.append(scales_ef.astype(F32)[:, None])
    arrays = varying_alike(*arrays, *tile_pairs)
    arrays, tile_pairs = arrays[: len(in_specs)], Pairs(*arrays[len(in_specs) :])
    kernel = partial(
        _product, groups=groups, steps=steps, transposed=transposed, scaled=scales_ef is not None
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(outer, wide), tile_pairs.count, steps),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((size, wide), lambda j, i, k, _, tile_w, *__: (tile_w[i], j)),
            scratch_shapes=[pltpu.VMEM((size, wide), F32)] if steps > 1 else [],
        ),
        out_shape=shape_like((rows, outer), x_md.dtype, *arrays),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inner * outer,
            bytes_accessed=x_md.nbytes + w_edf.nbytes + rows * outer * x_md.dtype.itemsize,
            transcendentals=0,
        ),
        name="grouped_matmul",
    )(*tile_pairs[:4], *arrays)


def _padded(x_md, w_edf, scales_ef, transposed):
    """The arrays with their contracted axis zero-padded to a multiple of LANES."""
    short = -x_md.shape[1] % LANES
    sides = [(0, 0), (0, 0), (0, 0)]
    sides[2 if transposed else 1] = (0, short)
    if transposed and scales_ef is not None:
        scales_ef = jnp.pad(scales_ef, [(0, 0), (0, short)])
    return jnp.pad(x_md, [(0, 0), (0, short)]), jnp.pad(w_edf, sides), scales_ef


def _product(
    group_w, tile_w, start_w, end_w, x_ref, w_ref, *refs, groups, steps, transposed, scaled
):
    scale_ref, y_ref, acc_ref = (refs if scaled else (None, *refs)) + (() if steps > 1 else (None,))
    i, k = pl.program_id(1), pl.program_id(2)
    group = group_w[i]

    def multiply(rows):
        x = x_ref[rows]
        if scaled and transposed:
            x = (x.astype(F32) * scale_ref[...]).astype(x.dtype)
        y = _dot(x, w_ref[...].astype(x.dtype), 1, 1 if transposed else 0)
        return y * scale_ref[...] if scaled and not transposed else y

    def write(rows, whole, inside, y):
        @pl.when(whole)
        def _():
            y_ref[rows] = y.astype(y_ref.dtype)

        @pl.when(~whole)
        def _():
            # Keep rows of other groups; each row belongs to exactly one group.
            before = y_ref[rows].astype(F32)
            y_ref[rows] = jnp.where(inside(y.shape), y, before).astype(y_ref.dtype)

    def add(rows, whole, inside):
        if steps == 1:
            write(rows, whole, inside, multiply(rows))
            return

        @pl.when(k == 0)
        def _():
            acc_ref[rows] = multiply(rows)

        @pl.when((k > 0) & (k < steps - 1))
        def _():
            acc_ref[rows] += multiply(rows)

        @pl.when(k == steps - 1)
        def _():
            write(rows, whole, inside, acc_ref[rows] + multiply(rows))

    at = tile_w[i] * y_ref.shape[0], start_w[i], end_w[i]

    @pl.when(group < groups)
    def _():
        _over_parts(add, y_ref.shape[0], PART, *at)

    @pl.when((group == groups) & (k == steps - 1))
    def _():
        zeros = jnp.zeros((min(PART, y_ref.shape[0]), y_ref.shape[1]), F32)
        _over_parts(partial(write, y=zeros), y_ref.shape[0], PART, *at)


def _over_parts(step, size, part, first, start, end):
    """Calls step(rows, whole, inside) for each part of the tile of `size` rows from `first` on that
    overlaps the group's rows start..end-1. `whole`: all rows of the part are in the group;
    inside(shape): the mask of rows that are."""
    part = min(part, size)
    low = jax.lax.div(jnp.maximum(start - first, 0), part)
    high = jax.lax.div(jnp.minimum(end - first, size) + part - 1, part)

    def body(j, _):
        row = j * part if size > part else 0
        whole = (start <= first + row) & (end >= first + row + part)

        def inside(shape):
            at = first + row + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            return (at >= start) & (at < end)

        step(pl.ds(row, part), whole, inside)

    jax.lax.fori_loop(low, high, body, None)


def weight_gradient(
    x_md: jax.Array, dy_mf: jax.Array, group_sizes_e: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Returns dw [E, D, F], summed in float32."""
    (rows, d), f = x_md.shape, dy_mf.shape[1]
    share = 2 / x_md.dtype.itemsize
    size = tile_rows(rows, SUM_PART, int(share * ROWS) // 2)
    wide_d, wide_f = divided(d, int(share * BLOCK_D)), block(f, int(share * BLOCK_F))
    groups = group_sizes_e.shape[0]
    tile_pairs = pairs(group_sizes_e, rows, size, every_group=True)
    x_md, dy_mf, *tile_pairs = varying_alike(x_md, dy_mf, *tile_pairs)
    tile_pairs = Pairs(*tile_pairs)
    return pl.pallas_call(
        _weight_gradient,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(d, wide_d), pl.cdiv(f, wide_f), tile_pairs.count),
            in_specs=[
                pl.BlockSpec((size, wide_d), lambda a, b, i, _, tile_w, *__: (tile_w[i], a)),
                pl.BlockSpec((size, wide_f), lambda a, b, i, _, tile_w, *__: (tile_w[i], b)),
            ],
            out_specs=pl.BlockSpec(
                (None, wide_d, wide_f), lambda a, b, i, group_w, *_: (group_w[i], a, b)
            ),
            scratch_shapes=[pltpu.VMEM((wide_d, wide_f), F32)],
        ),
        out_shape=shape_like((groups, d, f), dtype, x_md, dy_mf),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * d * f,
            bytes_accessed=x_md.nbytes + dy_mf.nbytes + groups * d * f * dtype.itemsize,
            transcendentals=0,
        ),
        name="grouped_matmul_dw",
    )(*tile_pairs[:4], x_md, dy_mf)


def _weight_gradient(group_w, tile_w, start_w, end_w, x_ref, dy_ref, dw_ref, acc_ref):
    i, count = pl.program_id(2), pl.num_programs(2)
    group = group_w[i]
    opens = (i == 0) | (group_w[jnp.maximum(i - 1, 0)] != group)
    closes = (i == count - 1) | (group_w[jnp.minimum(i + 1, count - 1)] != group)

    @pl.when(opens)
    def _():
        acc_ref[...] = jnp.zeros(acc_ref.shape, F32)

    def add(rows, whole, inside):
        @pl.when(whole)
        def _():
            acc_ref[...] += _dot(x_ref[rows], dy_ref[rows], 0, 0)

        @pl.when(~whole)
        def _():
            # Zero both: rows outside of the group or of the arrays may hold NaN.
            x, dy = x_ref[rows].astype(F32), dy_ref[rows].astype(F32)
            x, dy = jnp.where(inside(x.shape), x, 0), jnp.where(inside(dy.shape), dy, 0)
            acc_ref[...] += _dot(x.astype(x_ref.dtype), dy.astype(dy_ref.dtype), 0, 0)

    size = x_ref.shape[0]
    _over_parts(add, size, SUM_PART, tile_w[i] * size, start_w[i], end_w[i])

    @pl.when(closes)
    def _():
        dw_ref[...] = acc_ref[...].astype(dw_ref.dtype)


def _dot(a, b, axis_a, axis_b):
    """Matmul contracting one axis of each, in float32; at full precision for float32 inputs."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == F32 else None
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision, preferred_element_type=F32
    )
