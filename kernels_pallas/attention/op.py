"""The door to attention: checks the arguments and chooses the form that runs."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.attention import blocked, cudnn, hopper, tpu
from kernels_pallas.attention.blocked import Extras, Options
from kernels_pallas.attention.reference import ranks_in_documents
from kernels_pallas.dispatch import announce, on_platform
from kernels_pallas.varying import varying_alike

# Names, for policies of jax.checkpoint, of what the backward pass needs: with the second saved,
# attention is not computed twice, with both nothing before it is.
INPUTS, SAVED = "qkv", "attention"

# Queries in a block. On CPU a block's scores stay in cache; elsewhere larger blocks fill the chip.
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

    Keys lie at indices 0..S-1. The query's index is `positions`, or its place 0..T-1 when that is
    None. A key at index s is visible to a query at index t when `causal`: s <= t; `window`:
    t - s < window, or the key is one of the first `sink_tokens` (arXiv:2309.17453); and segments:
    equal. The first `prefix` keys are visible whatever `causal` and `window` say. With segments the
    first keys are those of each run of equal ids, else those of the row. A row that sees no key
    gives zeros.

    Args:
      q_btnh, k_bskh, v_bskh: queries, keys, values; the width of values may differ.
      causal: hides later keys.
      window: how many keys up to its own a query sees; needs `causal`.
      sink_tokens: the first keys, visible whatever the window.
      prefix: how many first keys every query sees (prefix-LM, arXiv:1910.10683), one number or one
        per row [B]; needs `causal`.
      segment_ids, kv_segment_ids: document of each query [B, T] and key [B, S]; the second is the
        first when it is left out and T == S.
      positions: index of each query among the keys [B, T], for chunks and cached decoding.
      softcap: scores become softcap * tanh(scores / softcap), before the mask (Gemma 2,
        arXiv:2408.00118).
      sinks: a learned logit per query head [N] that takes part in the softmax and carries no value
        (arXiv:2508.10925).
      alibi: slope per query head [N]; adds -slope * (t - s) to the scores (arXiv:2108.12409).
      scale: factor on the scores; H ** -0.5 when None.
      return_lse: also return the natural log of each softmax's denominator.
      implementation: "tpu", the Mosaic kernel (bfloat16 or float32, no `alibi`); "gpu", cuDNN's
        (`causal`, `window` and `scale` alone, bfloat16 or float16, on a machine that has it);
        "hopper", our kernels for H100 and H200 (also documents, positions, soft cap and
        `return_lse`; tried in an interpreter alone); or "reference", plain JAX in blocks. None
        takes that of the platform for which the program is lowered, where it has what is asked for
        ("hopper" is none's), else plain JAX in blocks.

    Returns:
      out_btnh in the dtype of q; the softmax is in float32. With `return_lse`, (out_btnh, lse_btn),
      the second in float32 and -1e30 where a row sees nothing. Both are differentiable.

    Raises:
      ValueError: naming the argument that does not fit and what would.
    """
    if prefix is not None:
        prefix = jnp.asarray(prefix)
        prefix = jnp.broadcast_to(prefix, q_btnh.shape[:1]) if prefix.ndim == 0 else prefix
    check(
        q_btnh, k_bskh, v_bskh, causal, window, sink_tokens, prefix, segment_ids, kv_segment_ids,
        positions, softcap, sinks, alibi,
    )  # fmt: skip
    if kv_segment_ids is None:
        kv_segment_ids = segment_ids
    ranks_bs = None
    if segment_ids is not None and (sink_tokens or prefix is not None):
        ranks_bs = ranks_in_documents(kv_segment_ids)
    extras = Extras(segment_ids, kv_segment_ids, ranks_bs, positions, prefix, sinks, alibi)
    scale = q_btnh.shape[-1] ** -0.5 if scale is None else scale
    options = Options(causal, window, sink_tokens, softcap, scale)
    tpu_lacks = tpu.lacks(q_btnh, k_bskh, v_bskh, extras)
    gpu_lacks = cudnn.lacks(q_btnh, k_bskh, v_bskh, extras, options, return_lse)
    lacks = {"tpu": tpu_lacks, "gpu": gpu_lacks}.get(implementation)
    if implementation == "hopper":
        lacks = hopper.lacks(q_btnh, k_bskh, v_bskh, extras, options)
    if lacks:
        raise ValueError(
            f"implementation={implementation!r} has no {lacks}; leave implementation out."
        )
    plain = "plain JAX in blocks"
    announce(
        "flash_attention",
        implementation,
        tpu=f"{plain} (no {tpu_lacks})" if tpu_lacks else "the Mosaic kernel",
        gpu=f"{plain} (no {gpu_lacks})" if gpu_lacks else "cuDNN",
        others=plain,
    )
    arrays, tree = jax.tree.flatten((q_btnh, k_bskh, v_bskh, extras))
    arrays = jax.tree.unflatten(tree, varying_alike(*arrays))
    if not gpu_lacks and implementation in (None, "gpu"):
        return _with_cudnn(implementation, options, *arrays)
    out_btnh, lse_bkgt = _attention(implementation, options, *arrays)
    if not return_lse:
        return out_btnh
    return out_btnh, jnp.moveaxis(lse_bkgt, 3, 1).reshape(q_btnh.shape[:3])


def _with_cudnn(implementation, options, q_btnh, k_bskh, v_bskh, extras):
    """The choice lies around both directions, since what cuDNN keeps for its backward pass is its
    own: with names alone saved, its forward pass runs twice."""
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


def _backward(implementation, options, kept, cotangents):
    *gradients, dsinks_n, dalibi_n = _on_platform(
        implementation, "backward", options, *kept, *cotangents
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
    """Gradients of queries, keys and values through a part of the keys, where `out_btnh` and
    `lse_btn` are those of all keys: what each part gives adds up to the gradient."""
    n, kv_heads = q_btnh.shape[2], k_bskh.shape[2]
    extras = Extras(segment_ids, kv_segment_ids, None, positions, None, None, alibi)
    scale = q_btnh.shape[-1] ** -0.5 if scale is None else scale
    options = Options(causal, window, 0, softcap, scale)

    def by_group(x_btn: jax.Array) -> jax.Array:
        x_btkg = x_btn.reshape(*x_btn.shape[:2], kv_heads, n // kv_heads)
        return jnp.moveaxis(x_btkg, 1, 3)

    kept = q_btnh, k_bskh, v_bskh, extras, out_btnh, by_group(lse_btn)
    return _backward(None, options, kept, (dout_btnh, by_group(dlse_btn)))[:3]


def _on_platform(implementation, direction, options, q_btnh, k_bskh, v_bskh, extras, *arrays):
    """`forward` or `backward` in the form that is asked for, or that of the platform."""
    in_blocks = getattr(blocked, direction)
    return on_platform(
        implementation,
        *(q_btnh, k_bskh, v_bskh, extras, *arrays),
        tpu=None
        if tpu.lacks(q_btnh, k_bskh, v_bskh, extras)
        else partial(getattr(tpu, direction), options=options),
        cpu=partial(in_blocks, options=options, block=BLOCK["cpu"]),
        hopper=partial(getattr(hopper, direction), options=options),
        reference=partial(in_blocks, options=options, block=BLOCK["default"], by_chunks=True),
    )


def check(
    q, k, v, causal, window, sink_tokens, prefix, segments, kv_segments, positions, softcap, sinks,
    alibi,
) -> None:  # fmt: skip
    """Raises ValueError naming the first argument that does not fit the others."""
    for name, array in (("q_btnh", q), ("k_bskh", k), ("v_bskh", v)):
        if array.ndim != 4:
            raise ValueError(
                f"{name} has shape {array.shape}; it needs four axes, as its name says."
            )
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
        raise ValueError(f"{n} query heads do not divide into {kv_heads} key/value heads.")
    if window is not None and not causal:
        raise ValueError(f"window={window} needs causal=True.")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, the query's own key.")
    if sink_tokens and window is None:
        raise ValueError(f"sink_tokens={sink_tokens} does nothing without a window.")
    if prefix is not None and not causal:
        raise ValueError("prefix does nothing without causal=True, where all keys are visible.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be above zero; None turns it off.")
    if segments is None and kv_segments is not None:
        raise ValueError("kv_segment_ids needs segment_ids.")
    if segments is not None and kv_segments is None and s != t:
        raise ValueError(f"{s} keys for {t} queries: segment_ids needs kv_segment_ids beside it.")
    if positions is None and s != t and (causal or alibi is not None):
        raise ValueError(f"{s} keys for {t} queries: give positions, the queries' indices.")
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
