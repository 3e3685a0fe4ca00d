"""The path on TPU: tiles of rows, each met by the matrices of the groups that have rows in it.

The pairs of tile and group are listed beforehand, sorted, and steer what is fetched (MegaBlocks,
arXiv:2211.15841), so the work is that of the rows there are: a matrix is read once for all of its
tiles, and only a tile in which two groups meet is masked.

Rows past the last group are one more group, E, whose product is zero.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.varying import shape_like, varying_alike

F32 = jnp.float32
# What a kernel may take of the chip's vector memory (v5p and tpu7x have 64 MiB a core).
VMEM = 48 * 2**20
# For numbers of 2 bytes; half as many for 4. Rows of a tile. The longest side over which a product
# is summed at once and the most weights in a block: together they keep a group's block in place
# for all of its rows, if it is no deeper than that. The widest block of outputs. The sides of a
# block of the gradient of weights.
ROWS, DEEP, WEIGHTS, WIDE, BLOCK_D, BLOCK_F = 1024, 4096, 3 * 2**20, 2048, 2048, 1408
# Rows that are multiplied at once, and in the gradient of weights summed over: those of a tile that
# belong to other groups are left out by so many.
PART, SUM_PART = 128, 256
LANES = 128


class Pairs(NamedTuple):
    """Pair i is rows tile_w[i] * size and following, of which start_w[i] to end_w[i] - 1 are those
    of group group_w[i]. Pairs from `count` on are void."""

    group_w: jax.Array
    tile_w: jax.Array
    start_w: jax.Array
    end_w: jax.Array
    count: jax.Array


def pairs(group_sizes_e: jax.Array, rows: int, size: int, every_group: bool) -> Pairs:
    """All pairs in order. `every_group` gives an empty group one pair too, and leaves out group E;
    otherwise each row is in a pair."""
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
    """The width of equal blocks of at most about `limit`, whole registers wide if not all of it."""
    if width <= limit:
        return width
    return pl.cdiv(pl.cdiv(width, pl.cdiv(width, limit)), LANES) * LANES


def divided(width: int, limit: int) -> int:
    """`block`, of which there are at least two where there can be: v5p has two cores to share them,
    and reading the rows once more costs the others less."""
    return block(width, limit if width <= LANES else min(limit, pl.cdiv(width, 2)))


def depth(width: int, limit: int) -> int:
    """The longest part over which a product is summed at once: all of `width`, or a divisor."""
    if width <= limit:
        return width
    return max(d for d in range(LANES, limit + 1, LANES) if width % d == 0)


def tile_rows(rows: int, part: int, limit: int) -> int:
    """Rows of a tile, in whole parts unless they are all of one part."""
    return rows if rows <= part else min(limit, pl.cdiv(rows, part) * part)


def product(
    x_md: jax.Array,
    w_edf: jax.Array,
    group_sizes_e: jax.Array,
    scales_ef: jax.Array | None = None,
    transposed: bool = False,
) -> jax.Array:
    """y [M, F]; `transposed` takes x [M, F] to y [M, D]. Weights of 8 bits are multiplied in x's
    dtype, and by `scales_ef` what they are multiplied with on their F side."""
    (rows, inner), outer = x_md.shape, w_edf.shape[1 if transposed else 2]
    share = 2 / x_md.dtype.itemsize
    if inner > share * DEEP and inner % LANES:
        x_md, w_edf, scales_ef = _filled(x_md, w_edf, scales_ef, transposed)
        inner = x_md.shape[1]
    size, deep = tile_rows(rows, PART, int(share * ROWS)), depth(inner, int(share * DEEP))
    wide = divided(outer, min(WIDE, int(share * WEIGHTS) // deep))
    groups = w_edf.shape[0]
    found = pairs(group_sizes_e, rows, size, every_group=False)
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
    arrays = varying_alike(*arrays, *found)
    arrays, found = arrays[: len(in_specs)], Pairs(*arrays[len(in_specs) :])
    kernel = partial(
        _product, groups=groups, steps=steps, transposed=transposed, scaled=scales_ef is not None
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(outer, wide), found.count, steps),
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
    )(*found[:4], *arrays)


def _filled(x_md, w_edf, scales_ef, transposed):
    """The arrays with zeros up to a multiple of LANES on the side that is summed over."""
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
            # Rows of other groups stay, or wait for theirs: each row is in exactly one group.
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
    """Calls step(rows, whether they are all in the group, the mask of those that are) for the parts
    of a tile of `size` rows from `first` on that meet the group's rows, start to end."""
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
    """dw [E, D, F], summed in float32."""
    (rows, d), f = x_md.shape, dy_mf.shape[1]
    share = 2 / x_md.dtype.itemsize
    size = tile_rows(rows, SUM_PART, int(share * ROWS) // 2)
    wide_d, wide_f = divided(d, int(share * BLOCK_D)), block(f, int(share * BLOCK_F))
    groups = group_sizes_e.shape[0]
    found = pairs(group_sizes_e, rows, size, every_group=True)
    x_md, dy_mf, *found = varying_alike(x_md, dy_mf, *found)
    found = Pairs(*found)
    return pl.pallas_call(
        _weight_gradient,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(d, wide_d), pl.cdiv(f, wide_f), found.count),
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
    )(*found[:4], x_md, dy_mf)


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
            # Both are cleared: what lies outside of the group, or of the arrays, may be no number.
            x, dy = x_ref[rows].astype(F32), dy_ref[rows].astype(F32)
            x, dy = jnp.where(inside(x.shape), x, 0), jnp.where(inside(dy.shape), dy, 0)
            acc_ref[...] += _dot(x.astype(x_ref.dtype), dy.astype(dy_ref.dtype), 0, 0)

    size = x_ref.shape[0]
    _over_parts(add, size, SUM_PART, tile_w[i] * size, start_w[i], end_w[i])

    @pl.when(closes)
    def _():
        dw_ref[...] = acc_ref[...].astype(dw_ref.dtype)


def _dot(a, b, axis_a, axis_b):
    """Sums over one axis of each, in float32; inputs of float32 are multiplied as such."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == F32 else None
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision, preferred_element_type=F32
    )
