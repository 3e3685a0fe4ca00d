"""Public paged attention: checks the arguments and selects the implementation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import announce, on_platform
from kernels_pallas.paged_attention import blocked, reference, tpu

WHOLE = (jnp.float32, jnp.bfloat16, jnp.float16)
QUANTIZED = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)


def paged_attention(
    q_btnh: jax.Array,
    k_pages_pksh: jax.Array,
    v_pages_pksh: jax.Array,
    table_bp: jax.Array,
    lengths_b: jax.Array,
    *,
    window: int | None = None,
    sink_tokens: int = 0,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: jax.Array | None = None,
    alibi: jax.Array | None = None,
    k_scales_pks: jax.Array | None = None,
    v_scales_pks: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal attention of the last T tokens of each sequence to all of its tokens, with keys and
    values in a paged KV cache (PagedAttention, arXiv:2309.06180). For decoding; not differentiable.

    Token i of sequence b is in slot i % S of page table[b, i // S]. Query head n reads key/value
    head n // (N // K). On several devices call it inside `jax.shard_map`, sharded over sequences or
    heads.

    Args:
      q_btnh: [B, T, N, H] queries of the last T tokens, whose keys and values are in the pages.
      k_pages_pksh, v_pages_pksh: [pages, K, S, H], with S slots per page, contiguous per page and
        head so that a page is one copy. float32, bfloat16 or float16, rounded to q's dtype where
        they are read; or int8 or float8 with scales.
      table_bp: [B, pages per sequence] page numbers; entries past the length are ignored.
      lengths_b: [B] tokens of each sequence, including the T new ones; 0 gives zeros.
      window: number of tokens that a query attends to, up to its own.
      sink_tokens: with a window, the first tokens of each sequence, visible to every later query.
        Pages between them and the window are not read.
      softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118).
      scale: factor on the scores; H ** -0.5 if None.
      sinks: [N] one logit per head in the denominator of the softmax (gpt-oss, arXiv:2508.10925).
      alibi: [N] slopes: subtracts slope * distance from the scores (arXiv:2108.12409).
      k_scales_pks, v_scales_pks: [pages, K, S] scales of quantized keys and values.
      return_lse: also return lse_btn, the log of the softmax's denominator.
      implementation: "tpu", "gpu" (plain JAX, a page at a time, also the choice on CPUs) or
        "reference"; None selects the platform's. The TPU kernel has neither sink_tokens, sinks,
        alibi, return_lse nor float16; with one of them TPUs run the plain one.

    Returns:
      out_btnh in the dtype of q; the softmax is in float32. With return_lse, (out_btnh, lse_btn).

    Raises:
      ValueError: an argument does not fit the others.
    """
    scales = None if k_scales_pks is None and v_scales_pks is None else (k_scales_pks, v_scales_pks)
    _check(q_btnh, k_pages_pksh, v_pages_pksh, table_bp, lengths_b, scales, window, softcap)
    if sink_tokens and window is None:
        raise ValueError(f"sink_tokens={sink_tokens} does nothing without a window.")
    of_heads = {name: x for name, x in (("sinks", sinks), ("alibi", alibi)) if x is not None}
    # The TPU kernel cannot convert float16.
    no_kernel = jnp.float16 in (q_btnh.dtype, k_pages_pksh.dtype)
    plain = bool(of_heads or sink_tokens or return_lse or no_kernel)
    announce("paged_attention", implementation, tpu="plain JAX" if plain else "the Mosaic kernel")
    own = {"window": window, "softcap": softcap}
    own["scale"] = q_btnh.shape[-1] ** -0.5 if scale is None else scale
    arrays = q_btnh, k_pages_pksh, v_pages_pksh
    tables = table_bp.astype(jnp.int32), lengths_b.astype(jnp.int32)

    def all_options(form: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., Any]:
        def run(*arrays: Any) -> Any:
            out, lse = form(*arrays, sink_tokens=sink_tokens, **own)
            return (out, lse) if return_lse else out

        return run

    def on_tpu(*arrays: Any) -> jax.Array:
        return tpu.paged_attention(*arrays[:-1], **own)

    by_page = all_options(blocked.paged_attention)
    return on_platform(
        implementation,
        *(*arrays, *tables, scales, of_heads),
        tpu=by_page if plain and implementation is None else on_tpu,
        gpu=by_page,
        cpu=by_page,
        reference=all_options(reference.paged_attention),
    )


def _check(q, k, v, table, lengths, scales, window, softcap) -> None:
    for name, array in (("q_btnh", q), ("k_pages_pksh", k), ("v_pages_pksh", v)):
        if array.ndim != 4:
            raise ValueError(f"{name} has shape {array.shape}; it needs four axes, one per letter.")
    if k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(
            f"k_pages_pksh {k.shape} {k.dtype} and v_pages_pksh {v.shape} {v.dtype} must have the "
            "same shape and dtype."
        )
    (b, _, n, h), (_, kv_heads, _, width) = q.shape, k.shape
    if q.dtype not in WHOLE:
        raise ValueError(f"q_btnh is {q.dtype}; it must be float32, bfloat16 or float16.")
    if h != width:
        raise ValueError(f"q_btnh has head width {h} but the pages have {width}.")
    if n % kv_heads:
        raise ValueError(f"{n} query heads must be a multiple of {kv_heads} key/value heads.")
    for name, array, shape in (("table_bp", table, (b, "pages")), ("lengths_b", lengths, (b,))):
        fits = array.ndim == len(shape) and array.shape[0] == b
        if not fits or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} is {array.dtype} {array.shape}; it needs integers {shape}.")
    if scales is None:
        if k.dtype not in WHOLE:
            raise ValueError(
                f"the pages are {k.dtype}; they must be float32, bfloat16 or float16, or int8 or "
                "float8 with k_scales_pks and v_scales_pks."
            )
    else:
        if k.dtype not in QUANTIZED:
            raise ValueError(
                f"k_scales_pks and v_scales_pks need pages of int8 or float8, not {k.dtype}."
            )
        for name, array in zip(("k_scales_pks", "v_scales_pks"), scales):
            if array is None or array.shape != k.shape[:3]:
                actual = "missing" if array is None else f"of shape {array.shape}"
                raise ValueError(f"{name} is {actual}; quantized pages need {k.shape[:3]}.")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 (the query's own token).")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive; None disables it.")
