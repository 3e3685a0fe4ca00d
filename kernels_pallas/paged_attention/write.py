"""Writes new keys and values into the pages of a KV cache, in place."""

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import on_platform
from kernels_pallas.paged_attention import write_tpu


def write_pages(
    pages: tuple[jax.Array, ...],
    new: tuple[jax.Array, ...],
    page_r: jax.Array,
    slot_r: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """Writes row r into slot slot_r[r] of page page_r[r], and leaves all other slots as they are.
    Donate the pages to the jitted function that calls this. On several devices call it inside
    `jax.shard_map`, sharded over heads.

    On TPUs XLA may store an array that it scatters into in another layout than a kernel reads, and
    then copies all pages twice per call; the TPU kernel copies only the tiles of the new rows.

    Args:
      pages: arrays [P, K, S, H] of keys and values, or [P, K, S] of their scales.
      new: for each array the rows, [R, K, H] or [R, K]; they are converted to the dtype of the
        pages, so round them to integers first if it has them.
      page_r, slot_r: [R] integers. A row whose page is P or more writes nothing. No two of the
        other rows are the same slot of the same page.
      implementation: "tpu" or "reference" (a scatter, also the choice on CPUs and GPUs); None
        selects the platform's. TPUs scatter too if the kernel does not support the dtype (float16,
        float8) or the number of slots.

    Raises:
      ValueError: an argument does not fit the others.
    """
    new = tuple(x.astype(stored.dtype) for stored, x in zip(pages, new, strict=True))
    for stored, x in zip(pages, new, strict=True):
        if x.shape != (*page_r.shape, stored.shape[1], *stored.shape[3:]):
            raise ValueError(
                f"rows {x.shape} do not fit pages {stored.shape}, {page_r.shape} rows."
            )
    supported = all(write_tpu.supports(x) for x in pages)
    if implementation == "tpu" and not supported:
        shapes = ", ".join(f"{x.dtype} {x.shape}" for x in pages)
        raise ValueError(f"the TPU kernel of write_pages does not support pages {shapes}.")
    return on_platform(
        implementation,
        *(pages, new, page_r.astype(jnp.int32), slot_r.astype(jnp.int32)),
        tpu=write_tpu.write_pages if supported else scatter,
        reference=scatter,
    )


def scatter(
    pages: tuple[jax.Array, ...], new: tuple[jax.Array, ...], page_r: jax.Array, slot_r: jax.Array
) -> tuple[jax.Array, ...]:
    """The specification."""
    return tuple(
        stored.at[page_r, :, slot_r].set(x, mode="drop")
        for stored, x in zip(pages, new, strict=True)
    )
