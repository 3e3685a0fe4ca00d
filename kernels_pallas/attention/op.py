"""Public attention function: checks the arguments and selects the implementation."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.attention import blocked, cudnn, hopper, tpu
from kernels_pallas.attention.blocked import Extras, Options
from kernels_pallas.attention.reference import ranks_in_documents
from kernels_pallas.dispatch import announce, on_platform
from kernels_pallas.varying import varying_alike

# Names, for jax.checkpoint policies, of the residuals of the backward pass. Saving SAVED (output
# and log-sum-exp) avoids recomputing attention; saving both, also the projections before it.
INPUTS, SAVED = "qkv", "attention"

# Queries per block. On CPU the scores of a block stay in cache; accelerators need larger blocks.
BLOCK = {"cpu": 64, "default": 256}


def flash_attention(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    sink_tokens: int = 0,
    prefix: int | jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention with grouped key/value heads: query head n reads key/value head
    n // (N // K).

    Keys have indices 0..S-1. Queries have the indices `positions`, or 0..T-1 if that is None. The
    query at index t attends to the key at index s if all of these hold:

    - `causal`: s <= t;
    - `window`: t - s < window, or the key is one of the first `sink_tokens` (arXiv:2309.17453);
    - segments: both have the same id.

    The first `prefix` keys are exempt from `causal` and `window`. With segments, first keys are
    counted in each run of equal ids, otherwise in the row. A row without visible keys gives zeros.

    Args:
      q_btnh, k_bskh, v_bskh: queries, keys, values; the head width of values may differ.
      causal: mask later keys.
      window: number of keys that a query attends to, up to its own; needs `causal`.
      sink_tokens: number of first keys that are visible outside the window.
      prefix: number of first keys visible to every query (prefix-LM, arXiv:1910.10683), one number
        or one per row [B]; needs `causal`.
      segment_ids, kv_segment_ids: document of each query [B, T] and key [B, S]; the second defaults
        to the first if T == S.
      positions: index of each query among the keys [B, T], for chunked prefill and decoding with a
        KV cache.
      softcap: scores become softcap * tanh(scores / softcap), before the mask (Gemma 2,
        arXiv:2408.00118).
      sinks: learned logit per query head [N] that joins the softmax without a value
        (arXiv:2508.10925).
      alibi: slope per query head [N]; adds -slope * (t - s) to the scores (arXiv:2108.12409).
      scale: factor on the scores; H ** -0.5 if None.
      return_lse: also return the log-sum-exp, the natural log of each softmax's denominator.
      implementation: "tpu", the Mosaic kernel (bfloat16 or float32, no `alibi`); "gpu", cuDNN
        (only `causal`, `window` and `scale`; bfloat16 or float16; needs cuDNN installed);
        "hopper", our kernels for H100 and H200 (also documents, positions, soft cap and
        `return_lse`; run only in an interpreter so far); or "reference", plain JAX in blocks. None
        selects the platform's implementation if it supports the options (never "hopper"), else
        plain JAX in blocks.

    Returns:
      out_btnh in the dtype of q; the softmax is in float32. With `return_lse`, (out_btnh, lse_btn):
      lse_btn is float32, -1e30 in rows without visible keys. Both are differentiable.

    Raises:
      ValueError: an argument does not fit the others, or the implementation lacks an option.
    """
    if prefix is not None:
        prefix = jnp.asarray(prefix)
        prefix = jnp.broadcast_to(prefix, q_btnh.shape[:1]) if prefix.ndim == 0 else prefix
    scale = q_btnh.shape[-1] ** -0.5 if scale is None else scale
    options = Options(causal, window, sink_tokens, softcap, scale)
    extras = Extras(segment_ids, kv_segment_ids, None, positions, prefix, sinks, alibi)
    return _select(q_btnh, k_bskh, v_bskh, extras, options, return_lse, implementation)


def _select(q_btnh, k_bskh, v_bskh, extras, options, return_lse, implementation):
    """Checks the arguments of `flash_attention` and calls the implementation."""
    _check(q_btnh, k_bskh, v_bskh, extras, options)
    extras = _with_document_ranks(extras, options)
    tpu_unsupported = tpu.unsupported(q_btnh, k_bskh, v_bskh, extras)
    gpu_unsupported = cudnn.unsupported(q_btnh, k_bskh, v_bskh, extras, options, return_lse)
    unsupported = {"tpu": tpu_unsupported, "gpu": gpu_unsupported}.get(implementation)
    if implementation == "hopper":
        unsupported = hopper.unsupported(q_btnh, k_bskh, v_bskh, extras, options)
    if unsupported:
        raise ValueError(
            f"implementation={implementation!r} does not support {unsupported}; "
            "omit implementation."
        )
    plain = "plain JAX in blocks"
    announce(
        "flash_attention",
        implementation,
        tpu=f"{plain} (unsupported: {tpu_unsupported})" if tpu_unsupported else "the Mosaic kernel",
        gpu=f"{plain} (unsupported: {gpu_unsupported})" if gpu_unsupported else "cuDNN",
        others=plain,
    )
    arrays, tree = jax.tree.flatten((q_btnh, k_bskh, v_bskh, extras))
    arrays = jax.tree.unflatten(tree, varying_alike(*arrays))
    if not gpu_unsupported and implementation in (None, "gpu"):
        return _with_cudnn(implementation, options, *arrays)
    out_btnh, lse_bkgt = _attention(implementation, options, *arrays)
    if not return_lse:
        return out_btnh
    return out_btnh, jnp.moveaxis(lse_bkgt, 3, 1).reshape(q_btnh.shape[:3])


def _with_document_ranks(extras, options):
    """Extras with the defaults that depend on segments."""
    if extras.segments_bt is None:
        return extras
    if extras.kv_segments_bs is None:
        extras = extras._replace(kv_segments_bs=extras.segments_bt)
    if options.sink_tokens or extras.prefix_b is not None:
        extras = extras._replace(ranks_bs=ranks_in_documents(extras.kv_segments_bs))
    return extras


def _with_cudnn(implementation, options, q_btnh, k_bskh, v_bskh, extras):
    """Selects cuDNN or plain JAX for forward and backward pass together, since cuDNN has residuals
    of its own. Checkpoint policies that save only INPUTS and SAVED run its forward pass twice."""
    q_btnh, k_bskh, v_bskh = checkpoint_name((q_btnh, k_bskh, v_bskh), INPUTS)

    def plain(q_btnh, k_bskh, v_bskh):
        return _attention(None, options, q_btnh, k_bskh, v_bskh, extras)[0]

    return on_platform(
        implementation,
        *(q_btnh, k_bskh, v_bskh),
        gpu=partial(cudnn.attention, options=options),
        reference=plain,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(implementation, options, q_btnh, k_bskh, v_bskh, extras):
    return _forward(implementation, options, q_btnh, k_bskh, v_bskh, extras)[0]


def _forward(implementation, options, q_btnh, k_bskh, v_bskh, extras):
    arrays = checkpoint_name((q_btnh, k_bskh, v_bskh), INPUTS)
    out_btnh, lse_bkgt = checkpoint_name(
        _on_platform(implementation, "forward", options, *arrays, extras), SAVED
    )
    return (out_btnh, lse_bkgt), (*arrays, extras, out_btnh, lse_bkgt)


def _backward(implementation, options, residuals, cotangents):
    *gradients, dsinks_n, dalibi_n = _on_platform(
        implementation, "backward", options, *residuals, *cotangents
    )
    none = Extras(*[None] * len(Extras._fields))
    return *gradients, none._replace(sinks_n=dsinks_n, alibi_n=dalibi_n)


_attention.defvjp(_forward, _backward)


def gradients_of_part(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    out_btnh: jax.Array,
    lse_btn: jax.Array,
    dout_btnh: jax.Array,
    dlse_btn: jax.Array,
    *,
    positions: jax.Array,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    alibi: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients (dq_btnh, dk_bskh, dv_bskh) through a part of the keys, for ring attention.

    `out_btnh` and `lse_btn` are the results over all keys; dq of all parts adds up to the gradient.
    Other arguments as in `flash_attention`.
    """
    n, kv_heads = q_btnh.shape[2], k_bskh.shape[2]
    extras = Extras(segment_ids, kv_segment_ids, None, positions, None, None, alibi)
    scale = q_btnh.shape[-1] ** -0.5 if scale is None else scale
    options = Options(causal, window, 0, softcap, scale)

    def by_group(x_btn: jax.Array) -> jax.Array:
        x_btkg = x_btn.reshape(*x_btn.shape[:2], kv_heads, n // kv_heads)
        return jnp.moveaxis(x_btkg, 1, 3)

    residuals = q_btnh, k_bskh, v_bskh, extras, out_btnh, by_group(lse_btn)
    return _backward(None, options, residuals, (dout_btnh, by_group(dlse_btn)))[:3]


def _on_platform(implementation, direction, options, q_btnh, k_bskh, v_bskh, extras, *arrays):
    """Calls the function named `direction`, "forward" or "backward", of the implementation."""
    in_blocks = getattr(blocked, direction)
    return on_platform(
        implementation,
        *(q_btnh, k_bskh, v_bskh, extras, *arrays),
        tpu=None
        if tpu.unsupported(q_btnh, k_bskh, v_bskh, extras)
        else partial(getattr(tpu, direction), options=options),
        cpu=partial(in_blocks, options=options, block=BLOCK["cpu"]),
        hopper=partial(getattr(hopper, direction), options=options),
        reference=partial(in_blocks, options=options, block=BLOCK["default"], by_chunks=True),
    )


def _check(q, k, v, extras, options) -> None:
    """Raises ValueError for the first argument that does not fit the others."""
    for name, array in (("q_btnh", q), ("k_bskh", k), ("v_bskh", v)):
        if array.ndim != 4:
            raise ValueError(f"{name} has shape {array.shape}; it needs four axes, one per letter.")
    (b, t, n, h), (s, kv_heads) = q.shape, k.shape[1:3]
    if k.shape != (b, s, kv_heads, h):
        raise ValueError(
            f"k_bskh {k.shape} must have the batch and head width of q_btnh {q.shape}."
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v_bskh {v.shape} must have the batch, length and heads of k_bskh {k.shape}."
        )
    if n % kv_heads:
        raise ValueError(f"{n} query heads must be a multiple of {kv_heads} key/value heads.")
    causal, window, sink_tokens, softcap, _ = options
    segments, kv_segments, _, positions, prefix, sinks, alibi = extras
    if window is not None and not causal:
        raise ValueError(f"window={window} needs causal=True.")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 (the query's own key).")
    if sink_tokens and window is None:
        raise ValueError(f"sink_tokens={sink_tokens} has no effect without a window; set window.")
    if prefix is not None and not causal:
        raise ValueError("prefix has no effect without causal=True; all keys are visible already.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive; None disables it.")
    if segments is None and kv_segments is not None:
        raise ValueError("kv_segment_ids needs segment_ids.")
    if segments is not None and kv_segments is None and s != t:
        raise ValueError(f"{s} keys for {t} queries: segment_ids needs kv_segment_ids too.")
    if positions is None and s != t and (causal or alibi is not None):
        raise ValueError(f"{s} keys for {t} queries: pass positions, the index of each query.")
    for name, array, shape in (
        ("segment_ids", segments, (b, t)),
        ("kv_segment_ids", kv_segments, (b, s)),
        ("positions", positions, (b, t)),
        ("prefix", prefix, (b,)),
        ("sinks", sinks, (n,)),
        ("alibi", alibi, (n,)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; it needs {shape}.")
