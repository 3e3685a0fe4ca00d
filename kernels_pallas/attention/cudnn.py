"""Attention on NVIDIA GPUs: cuDNN's fused kernels, as `jax.nn.dot_product_attention` offers them.

JAX's own kernels for GPUs are no choice: its Triton backend is deprecated since 0.11, and its
Mosaic attention takes float16 alone and has no causal backward pass. What cuDNN lacks stays with
the plain form in blocks, or is asked of our own kernels by name (`hopper.py`).
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.attention.blocked import Extras, Options


def attention(
    q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, *, options: Options
) -> jax.Array:
    """out_btnh; cuDNN keeps its own log-sum-exp for its own backward pass."""
    # cuDNN counts the keys before the query's own, and none after it under a causal mask.
    window = None if options.window is None else (options.window - 1, 0)
    return jax.nn.dot_product_attention(
        *(q_btnh, k_bskh, v_bskh),
        scale=options.scale,
        is_causal=options.causal,
        local_window_size=window,
        implementation="cudnn",
    )


def lacks(q_btnh, k_bskh, v_bskh, extras: Extras, options: Options, lse: bool) -> str | None:
    """What these arrays and options ask for that cuDNN, as JAX offers it, has not, in words."""
    names = {
        "segments_bt": "segment_ids",
        "positions_bt": "positions",
        "prefix_b": "prefix",
        "sinks_n": "sinks",
        "alibi_n": "alibi",
    }
    asked = {words: getattr(extras, field) is not None for field, words in names.items()}
    asked |= {"sink_tokens": options.sink_tokens, "softcap": options.softcap is not None}
    # jax.nn rounds the log-sum-exp to the dtype of q, and drops its gradient.
    asked |= {"return_lse": lse}
    for words, wanted in asked.items():
        if wanted:
            return words
    if words := lacks_for_arrays(q_btnh, k_bskh, v_bskh):
        return words
    if not _found():
        return 'cuDNN on this machine (pip install "jax[cuda12]" brings it)'
    width, widest = q_btnh.shape[-1], _widest()
    if width % 8 or width > widest:
        return f"heads of {width} (multiples of 8 up to {widest})"
    return None


def lacks_for_arrays(q_btnh, k_bskh, v_bskh) -> str | None:
    """As `lacks`, of dtypes and widths: what holds for the tensor cores of any form."""
    if len({x.dtype for x in (q_btnh, k_bskh, v_bskh)}) > 1:
        return "queries, keys and values in several dtypes"
    if q_btnh.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q_btnh.dtype} (bfloat16 and float16)"
    if v_bskh.shape[-1] != q_btnh.shape[-1]:
        return "values of another width than the keys"
    return None


def _widest() -> int:
    """The widest head that cuDNN takes on this machine's GPU: more from Hopper on."""
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return 256 if float(capability) >= 9 else 128


def _found() -> bool:
    """Whether JAX finds cuDNN here: without it, its form can't even be traced."""
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(partial(attention, options=Options(True, None, 0, None, 1.0)), x, x, x)
    except RuntimeError:
        return False
    return True
