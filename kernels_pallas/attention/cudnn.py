"""Attention on NVIDIA GPUs: cuDNN's fused kernels, through `jax.nn.dot_product_attention`.

JAX's own GPU kernels are no alternative: the Triton backend is deprecated since 0.11, and the
Mosaic attention takes only float16 and has no causal backward pass. Options that cuDNN does not
support run in plain JAX, or in our own kernels (`hopper.py`) if selected by name.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.attention.blocked import Extras, Options


def attention(
    q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, *, options: Options
) -> jax.Array:
    """Returns out_btnh. cuDNN saves its own log-sum-exp for its backward pass."""
    # local_window_size counts keys before and after the query's own.
    window = None if options.window is None else (options.window - 1, 0)
    return jax.nn.dot_product_attention(
        *(q_btnh, k_bskh, v_bskh),
        scale=options.scale,
        is_causal=options.causal,
        local_window_size=window,
        implementation="cudnn",
    )


def unsupported(q_btnh, k_bskh, v_bskh, extras: Extras, options: Options, lse: bool) -> str | None:
    """Names the first thing that cuDNN through JAX does not support; None if nothing."""
    names = {
        "segments_bt": "segment_ids",
        "positions_bt": "positions",
        "prefix_b": "prefix",
        "sinks_n": "sinks",
        "alibi_n": "alibi",
    }
    used = {name: getattr(extras, field) is not None for field, name in names.items()}
    used |= {"sink_tokens": options.sink_tokens, "softcap": options.softcap is not None}
    # jax.nn rounds the log-sum-exp to the dtype of q and drops its gradient.
    used |= {"return_lse": lse}
    for name, is_used in used.items():
        if is_used:
            return name
    if reason := unsupported_arrays(q_btnh, k_bskh, v_bskh):
        return reason
    if not _has_cudnn():
        return 'machines without cuDNN (install it: pip install "jax[cuda12]")'
    width, widest = q_btnh.shape[-1], _widest()
    if width % 8 or width > widest:
        return f"head width {width} (only multiples of 8 up to {widest})"
    return None


def unsupported_arrays(q_btnh, k_bskh, v_bskh) -> str | None:
    """As `unsupported`, for dtypes and widths: limits of every tensor core implementation."""
    if len({x.dtype for x in (q_btnh, k_bskh, v_bskh)}) > 1:
        return "different dtypes of queries, keys and values"
    if q_btnh.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q_btnh.dtype} (only bfloat16 and float16)"
    if v_bskh.shape[-1] != q_btnh.shape[-1]:
        return "values of another head width than the keys"
    return None


def _widest() -> int:
    """Largest head width that cuDNN supports on this machine's GPU; larger from Hopper on."""
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return 256 if float(capability) >= 9 else 128


def _has_cudnn() -> bool:
    """Whether JAX finds cuDNN on this machine. Without it, tracing the cuDNN call raises."""
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(partial(attention, options=Options(True, None, 0, None, 1.0)), x, x, x)
    except RuntimeError:
        return False
    return True
