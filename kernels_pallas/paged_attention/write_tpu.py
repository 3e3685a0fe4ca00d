"""Writes rows into pages on TPU (Mosaic). Memory is copied in whole register tiles, so the kernel
reads the tile of each row, changes one slot of it, and writes it back.

Rows of one tile, as consecutive tokens of a prompt are, share the copy of the first of them. A
program handles a block of rows: it waits for the copies of all tiles, changes them, and waits until
they are written, before the next program reads.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.varying import varying_alike

LANES = 128
DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8)
# Most rows of a block, and most bytes of their tiles.
ROWS, BLOCK_BYTES = 64, 8 * 2**20
VMEM = 48 * 2**20
# Rows whose instructions the compiler interleaves.
UNROLL = 4


def supports(pages: jax.Array) -> bool:
    """Whether the kernel can write to these pages."""
    return pages.dtype in DTYPES and pages.shape[2] % _tile(pages) == 0


def write_pages(
    pages: tuple[jax.Array, ...], new: tuple[jax.Array, ...], page_r: jax.Array, slot_r: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns the pages with the rows; see write.py."""
    tiles = [_tile(x) for x in pages]
    block = min(page_r.size, ROWS, max(1, BLOCK_BYTES // _bytes_per_row(pages, tiles)))
    padding = -page_r.size % block
    page_r = jnp.pad(page_r, (0, padding), constant_values=pages[0].shape[0])
    slot_r = jnp.pad(slot_r, (0, padding))
    sizes = sorted(set(tiles))
    numbers = [page_r, slot_r]
    for tile in sizes:
        numbers += _tables(page_r, slot_r // tile, block, pages[0].shape[0])
    rows = [_prepared(x, stored, padding) for x, stored in zip(new, pages, strict=True)]
    *numbers, rows, pages = _alike(numbers, rows, pages)
    whole = [pl.BlockSpec(memory_space=pltpu.HBM)] * len(pages)

    def of_block(x):
        return pl.BlockSpec((block, *x.shape[1:]), lambda i, *_: (i, *[0] * (x.ndim - 1)))

    def buffer(stored, tile):
        return pltpu.VMEM((block, stored.shape[1], tile, *stored.shape[3:]), stored.dtype)

    written = pl.pallas_call(
        partial(_kernel, tiles=tiles, sizes=sizes, block=block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(numbers),
            grid=(page_r.size // block,),
            in_specs=[*map(of_block, rows), *whole],
            out_specs=whole,
            scratch_shapes=[pltpu.SemaphoreType.DMA((2,)), *map(buffer, pages, tiles)],
        ),
        out_shape=[pltpu.HBM.like(x) for x in pages],
        input_output_aliases={len(numbers) + len(rows) + i: i for i in range(len(pages))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=VMEM,
            disable_bounds_checks=True,  # half of the instructions; `copies` clips the pages
        ),
        name="write_pages",
    )(*numbers, *rows, *pages)
    return tuple(written)


def _tile(pages: jax.Array) -> int:
    """Slots that are copied together."""
    return LANES if pages.ndim == 3 else 32 // pages.dtype.itemsize


def _bytes_per_row(pages, tiles) -> int:
    sizes = (math.prod(x.shape[1:]) // x.shape[2] * x.dtype.itemsize for x in pages)
    return sum(size * tile for size, tile in zip(sizes, tiles))


def _tables(page_r, tile_r, block: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Of each row: the first row of its block that has the same tile; and whether it is that row,
    and has a page."""
    page_br, tile_br = page_r.reshape(-1, block), tile_r.reshape(-1, block)
    same_brr = (page_br[:, :, None] == page_br[:, None]) & (tile_br[:, :, None] == tile_br[:, None])
    first_br = jnp.argmax(same_brr, axis=2).astype(jnp.int32)
    writes_br = (first_br == jnp.arange(block)) & (page_br < count)
    return first_br.reshape(-1), writes_br.astype(jnp.int32).reshape(-1)


def _prepared(new: jax.Array, stored: jax.Array, padding: int) -> jax.Array:
    """In 32 bits, in which the kernel selects; scales repeated over the lanes of a tile."""
    new = new.astype(jnp.float32 if jnp.issubdtype(new.dtype, jnp.floating) else jnp.int32)
    if stored.ndim == 3:
        new = jnp.broadcast_to(new[..., None], (*new.shape, LANES))
    return jnp.pad(new, [(0, padding)] + [(0, 0)] * (new.ndim - 1))


def _alike(numbers, rows, pages):
    arrays = varying_alike(*numbers, *rows, *pages)
    n, end = len(numbers), len(numbers) + len(rows)
    return *arrays[:n], arrays[n:end], arrays[end:]


def _kernel(page, slot, *refs, tiles, sizes, block):
    tables, refs = refs[: 2 * len(sizes)], refs[2 * len(sizes) :]
    n = len(tiles)
    # The pages among the inputs are the outputs.
    rows, outputs, (semaphores, *buffers) = refs[:n], refs[2 * n : 3 * n], refs[3 * n :]
    firsts = [tables[2 * sizes.index(tile)] for tile in tiles]
    base = pl.program_id(0) * block
    last = outputs[0].shape[0] - 1

    def copies(r, tile, direction):
        """Of the tiles of row r in all arrays with this tile; direction 0 reads, 1 writes."""
        number = jnp.clip(page[base + r], 0, last)
        at = pl.ds(pl.multiple_of(jax.lax.div(slot[base + r], tile) * tile, tile), tile)
        for stored, buffer, own in zip(outputs, buffers, tiles):
            if own == tile:
                ends = stored.at[(number, slice(None), at)], buffer.at[r]
                ends = ends[::-1] if direction else ends
                yield pltpu.make_async_copy(*ends, semaphores.at[direction])

    def read(r, _):
        # Also for rows that share a tile or write nothing: a condition would cost as much.
        for tile in sizes:
            for copy in copies(r, tile, 0):
                copy.start()

    def change(r, _):
        for new, buffer, tile, first in zip(rows, buffers, tiles, firsts):
            _set(new, buffer, r, first[base + r], jax.lax.rem(slot[base + r], tile))

    def write(action):
        for tile, writes in zip(sizes, tables[1::2]):

            def row(r, _, tile=tile, writes=writes):
                @pl.when(writes[base + r] == 1)
                def _():
                    for copy in copies(r, tile, 1):
                        getattr(copy, action)()

            jax.lax.fori_loop(0, block, row, None, unroll=UNROLL)

    jax.lax.fori_loop(0, block, read, None, unroll=UNROLL)
    for buffer in buffers:  # waits for the copies of all rows
        pltpu.make_async_copy(buffer, buffer, semaphores.at[0]).wait()
    jax.lax.fori_loop(0, block, change, None, unroll=UNROLL)
    write("start")
    write("wait")


def _set(new, buffer, r, at, slot):
    """Sets a slot of the tile buffer[at] to new[r]."""
    if len(buffer.shape) == 3:  # scales, slots along the lanes
        inside = jax.lax.broadcasted_iota(jnp.int32, buffer.shape[1:], 1) == slot
        buffer[at] = jnp.where(inside, new[r], buffer[at])
        return
    inside = jax.lax.broadcasted_iota(jnp.int32, buffer.shape[2:], 0) == slot
    for k in range(buffer.shape[1]):
        row = new[r, pl.ds(k, 1), :]
        wide = buffer[at, k].astype(row.dtype)
        buffer[at, k] = jnp.where(inside, row, wide).astype(buffer.dtype)
