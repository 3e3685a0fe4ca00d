"""The door to attention: checks the arguments and chooses the form that runs."""

from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.attention import blocked
from kernels_pallas.attention.blocked import Extras, Options

# The name, for policies of jax.checkpoint, of what the backward pass needs: with it saved,
# attention is not computed twice.
SAVED = "attention"

# Queries in a block. On CPU a block's scores stay in cache; elsewhere larger blocks fill the chip.
BLOCK = {"cpu": 64, "default": 256}


def attention(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    sink_tokens: int = 0,
    segments_bt: jax.Array | None = None,
    kv_segments_bs: jax.Array | None = None,
    positions_bt: jax.Array | None = None,
    softcap: float | None = None,
    sinks_n: jax.Array | None = None,
    alibi_n: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Softmax attention with grouped key/value heads: query head n reads key/value head
    n // (N // K).

    Keys lie at indices 0..S-1. The query's index is `positions_bt`, or its place 0..T-1 when that
    is None (queries and keys are then the same sequence). A key at index s is visible to a query at
    index t when all of these hold: `causal`: s <= t; `window`: t - s < window, or s < `sink_tokens`
    (arXiv:2309.17453); segments: equal. A row that sees no key gives zeros.

    Args:
      q_btnh, k_bskh, v_bskh: queries, keys, values.
      causal: hides later keys.
      window: how many keys up to its own a query sees; needs `causal`.
      sink_tokens: the first keys, visible whatever the window.
      segments_bt, kv_segments_bs: document of each query and key; the second is the first when it
        is left out and T == S.
      positions_bt: index of each query among the keys, for cached decoding.
      softcap: scores become softcap * tanh(scores / softcap), before the mask (Gemma 2,
        arXiv:2408.00118).
      sinks_n: a learned logit per query head that takes part in the softmax and carries no value.
      alibi_n: slope per query head; adds -slope * (t - s) to the scores (arXiv:2108.12409).
      scale: factor on the scores; H ** -0.5 when None.

    Returns:
      out_btnh in the dtype of q; the softmax is in float32.

    Raises:
      ValueError: naming the argument that does not fit and what would.
    """
    check(
        q_btnh, k_bskh, v_bskh, causal, window, sink_tokens, segments_bt, kv_segments_bs,
        positions_bt, softcap, sinks_n, alibi_n,
    )  # fmt: skip
    if kv_segments_bs is None:
        kv_segments_bs = segments_bt
    extras = Extras(segments_bt, kv_segments_bs, positions_bt, sinks_n, alibi_n)
    scale = q_btnh.shape[-1] ** -0.5 if scale is None else scale
    options = Options(causal, window, sink_tokens, softcap, scale)
    return _attention(options, q_btnh, k_bskh, v_bskh, extras)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q_btnh, k_bskh, v_bskh, extras):
    return _forward(options, q_btnh, k_bskh, v_bskh, extras)[0]


def _forward(options, q_btnh, k_bskh, v_bskh, extras):
    arrays = checkpoint_name((q_btnh, k_bskh, v_bskh), SAVED)
    out_btnh, lse_bkgt = checkpoint_name(
        _on_platform(blocked.forward, options, *arrays, extras), SAVED
    )
    return out_btnh, (*arrays, extras, out_btnh, lse_bkgt)


def _backward(options, kept, dout_btnh):
    *gradients, dsinks_n, dalibi_n = _on_platform(blocked.backward, options, *kept, dout_btnh)
    return *gradients, Extras(None, None, None, dsinks_n, dalibi_n)


_attention.defvjp(_forward, _backward)


def _on_platform(function, options, *arrays):
    """`function` with the block size of the platform that the program is lowered for."""
    forms = {
        platform: partial(function, options=options, block=block)
        for platform, block in BLOCK.items()
    }
    return jax.lax.platform_dependent(*arrays, **forms)


def check(
    q, k, v, causal, window, sink_tokens, segments, kv_segments, positions, softcap, sinks, alibi
) -> None:
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
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be above zero; None turns it off.")
    if segments is None and kv_segments is not None:
        raise ValueError("kv_segments_bs needs segments_bt.")
    if segments is not None and kv_segments is None and s != t:
        raise ValueError(f"{s} keys for {t} queries: segments_bt needs kv_segments_bs beside it.")
    if positions is None and s != t:
        raise ValueError(f"{s} keys for {t} queries: give positions_bt, the queries' indices.")
    for name, array, shape in (
        ("segments_bt", segments, (b, t)),
        ("kv_segments_bs", kv_segments, (b, s)),
        ("positions_bt", positions, (b, t)),
        ("sinks_n", sinks, (n,)),
        ("alibi_n", alibi, (n,)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; it needs {shape}.")
