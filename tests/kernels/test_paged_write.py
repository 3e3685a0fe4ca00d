"""The TPU kernel that writes rows into pages, in interpret mode, equals the scatter, which changes
the slots of the rows and no others."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import float32, integers, interpreted, jit, normal

from kernels_pallas import write_pages
from kernels_pallas.paged_attention import write_tpu

PAGES, HEADS, WIDTH = 4, 2, 16


def arguments(places, slots=16, dtype=jnp.bfloat16, heads=HEADS):
    """(pages, rows, page_r, slot_r) of rows at these places; place p is slot p % slots of page
    p // slots, and PAGES is the first page that is none. int8 pages have scales. All slots of the
    first page hold NaN where the dtype has it."""

    def values(seed, *shape):
        if dtype == jnp.int8:
            return integers(seed, -127, 128, *shape, dtype=dtype)
        return normal(seed, *shape, dtype=dtype)

    pages = [values(seed, PAGES, heads, slots, WIDTH) for seed in (1, 2)]
    rows = [values(seed, len(places), heads, WIDTH) for seed in (3, 4)]
    if dtype == jnp.int8:
        pages += [normal(seed, PAGES, heads, slots) for seed in (5, 6)]
        rows += [normal(seed, len(places), heads) for seed in (7, 8)]
    else:
        pages = [x.at[0].set(jnp.nan) for x in pages]
    page_r, slot_r = np.divmod(np.array(places, np.int32), slots)
    return tuple(pages), tuple(rows), jnp.asarray(page_r), jnp.asarray(slot_r)


@functools.cache
def jitted(implementation, *interpret):
    """Shared by calls of the same shapes and interpretation, which counts while tracing."""
    return jit(functools.partial(write_pages, implementation=implementation))


def compare(given, **interpret):
    """Compares kernel and scatter, bit for bit. A copy happens as late as possible, when the kernel
    waits for it, or with "eager" as early as possible."""
    with interpreted(**interpret):
        got = jitted("tpu", *interpret.items())(*given)
    for one, other in zip(got, jitted("reference")(*given), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(*float32(one, other))


def test_the_scatter_writes_the_rows_and_nothing_else():
    """In a loop of numpy; the row of the page behind the last one is left out."""
    pages, rows, page_r, slot_r = given = arguments([17, 3, 64, 18, 63])
    got = jitted("reference")(*given)
    for stored, new, result in zip(pages, rows, got, strict=True):
        want = np.array(stored)
        for row, page, slot in zip(np.asarray(new), page_r.tolist(), slot_r.tolist(), strict=True):
            if page < PAGES:
                want[page, :, slot] = row
        np.testing.assert_array_equal(*float32(result, want))


@pytest.mark.parametrize("copies", ["on_wait", "eager"])
@pytest.mark.parametrize(
    "places",
    [
        [17, 3, 50],  # a page each
        [35, 36, 37, 38, 39, 40],  # consecutive tokens of a prompt
        [40, 8, 39, 64, 38, 9],  # rows of one page apart from each other, one that writes nothing
        [64, 64],
        [5],
    ],
    ids=str,
)
def test_equals_the_scatter(places, copies):
    compare(arguments(places), dma_execution_mode=copies)


@pytest.mark.parametrize(
    ("slots", "dtype"),
    [(8, jnp.float32), (32, jnp.float32), (256, jnp.int8), (32, jnp.bfloat16)],
    ids=str,
)
def test_formats_of_pages(slots, dtype):
    """Pages of one tile and of several; int8 with scales."""
    compare(arguments([0, 3 * slots, slots + 7, slots + 1, 4 * slots, 1], slots, dtype))


def test_rows_of_one_tile_in_two_blocks(monkeypatch):
    """The second block reads what the first one wrote."""
    monkeypatch.setattr(write_tpu, "ROWS", 4)
    given = arguments([32, 33, 2, 34, 35, 64, 36], slots=8, dtype=jnp.float32)
    with interpreted(detect_races=True):
        got = jit(functools.partial(write_pages, implementation="tpu"))(*given)
    for one, other in zip(got, jitted("reference")(*given), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("places", [[35, 36, 3, 64, 37], [64]], ids=str)
def test_has_no_race(places, capfd):
    compare(arguments(places), detect_races=True)
    assert "race" not in capfd.readouterr().out.lower()


@pytest.mark.slow
@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    places=st.lists(st.integers(0, 4 * 16 - 1), min_size=1, max_size=9, unique=True),
    unused=st.sets(st.integers(0, 8)),
    heads=st.sampled_from([1, 3]),
)
def test_any_rows(places, unused, heads):
    places = [4 * 16 + i if i in unused else place for i, place in enumerate(places)]
    compare(arguments(places, heads=heads))


@pytest.mark.parametrize(
    ("slots", "dtype"), [(8, jnp.bfloat16), (16, jnp.float16), (32, jnp.int8)], ids=str
)
def test_pages_that_the_kernel_does_not_support(slots, dtype):
    given = arguments([3, 9], slots, dtype)
    with pytest.raises(ValueError, match="the TPU kernel of write_pages does not support pages"):
        write_pages(*given, implementation="tpu")


def test_rejects_rows_that_do_not_fit():
    pages, rows, page_r, slot_r = arguments([3, 9])
    with pytest.raises(ValueError, match=r"rows \(2, 2, 8\) do not fit pages \(4, 2, 16, 16\)"):
        write_pages(pages, tuple(x[..., :8] for x in rows), page_r, slot_r)
