"""Attention on Hopper GPUs by our own kernels: lays out arrays for them and converts the results.

The kernels have run only in an interpreter, so they must be selected by name.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.attention.blocked import Extras, Options
from kernels_pallas.attention.cudnn import unsupported_arrays
from kernels_pallas.attention.ranges import ranges
from kernels_pallas.attention.reference import HIDDEN

F32, INT32 = jnp.float32, jnp.int32
WIDTHS = (64, 128)


def unsupported(q_btnh, k_bskh, v_bskh, extras: Extras, options: Options) -> str | None:
    """Names the first thing that the kernels do not support, for a message; None if nothing."""
    names = {"prefix_b": "prefix", "sinks_n": "sinks", "alibi_n": "alibi"}
    for field, name in names.items():
        if getattr(extras, field) is not None:
            return name
    if options.sink_tokens:
        return "sink_tokens"
    if reason := unsupported_arrays(q_btnh, k_bskh, v_bskh):
        return reason
    width = q_btnh.shape[-1]
    if width not in WIDTHS:
        return f"head width {width} (only {' and '.join(map(str, WIDTHS))})"
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    if capability != "9.0":
        return f"GPUs of compute capability {capability} (only 9.0, Hopper)"
    return None


def forward(q_btnh, k_bskh, v_bskh, extras: Extras, *, options: Options):
    """Returns (out_btnh, lse_bkgt)."""
    from kernels_pallas.attention import hopper_kernels

    t, kv_heads = q_btnh.shape[1], k_bskh.shape[2]
    rest, mask = _masked(q_btnh, k_bskh, extras, options)
    table = _table(q_btnh, k_bskh, extras, options, hopper_kernels.ROWS, hopper_kernels.CHUNK)
    q, k, v = (_padded(x) for x in (q_btnh, k_bskh, v_bskh))
    out, lse = hopper_kernels.forward(
        q, _transposed(k), v, *rest, table, options=options, mask=mask
    )
    lse_bkgt = lse[..., :t].reshape(lse.shape[0], kv_heads, -1, t)
    return out[:, :t], lse_bkgt


def backward(q_btnh, k_bskh, v_bskh, extras, out_btnh, lse_bkgt, dout_btnh, dlse_bkgt, *, options):
    """Returns (dq_btnh, dk_bskh, dv_bskh, None, None); sinks and alibi are not supported."""
    from kernels_pallas.attention import hopper_kernels

    (b, t, n, _), s = q_btnh.shape, k_bskh.shape[1]
    delta_btn = jnp.sum(dout_btnh.astype(F32) * out_btnh.astype(F32), axis=-1)
    # d lse / d score is the weight p, as in the softmax, so both gradients are one difference.
    delta = jnp.swapaxes(delta_btn, 1, 2) - dlse_bkgt.reshape(b, n, t)
    lse = lse_bkgt.reshape(b, n, t)
    # Rows without visible keys get weights exp2(HIDDEN - 0) = 0.
    lse = jnp.where(lse > HIDDEN / 2, lse * hopper_kernels.LOG2_E, 0)
    lse, delta = (_padded(x, axis=2) for x in (lse, delta))
    rest, mask = _masked(q_btnh, k_bskh, extras, options)
    rows, chunk = hopper_kernels.ROWS, hopper_kernels.CHUNK_BACK
    of_queries = _table(q_btnh, k_bskh, extras, options, rows, chunk)
    of_keys = _table(q_btnh, k_bskh, extras, options, chunk, rows, by_keys=True)
    q, k, v, dout = (_padded(x) for x in (q_btnh, k_bskh, v_bskh, dout_btnh.astype(q_btnh.dtype)))
    dq = hopper_kernels.backward_queries(
        *(q, k, _transposed(k), _transposed(v), dout, lse, delta, *rest, of_queries),
        options=options,
        mask=mask,
    )
    dk, dv = hopper_kernels.backward_keys(
        *(q, _transposed(q), k, v, dout, _transposed(dout), lse, delta, *rest, of_keys),
        options=options,
        mask=mask,
    )
    return dq[:, :t], dk[:, :s], dv[:, :s], None, None


def _padded(x, axis=1):
    """x padded with zeros to a multiple of ROWS."""
    from kernels_pallas.attention.hopper_kernels import ROWS

    widths = [(0, -x.shape[i] % ROWS if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)


def _transposed(x_btnh):
    return jnp.transpose(x_btnh, (0, 2, 3, 1))


def _masked(q_btnh, k_bskh, extras, options):
    """Returns ([pos_bt, ids_bt, kv_ids_bs], Mask), the arrays padded to whole blocks."""
    from kernels_pallas.attention.hopper_kernels import ROWS, Mask

    (b, t), s = q_btnh.shape[:2], k_bskh.shape[1]
    pos = jnp.arange(t)[None] if extras.positions_bt is None else extras.positions_bt
    segments = extras.segments_bt is not None
    ids, kv_ids = (extras.segments_bt, extras.kv_segments_bs) if segments else (pos, jnp.arange(s))
    arrays = [
        _padded(jnp.broadcast_to(x, (b, length)).astype(INT32))
        for x, length in ((pos, t), (ids, t), (kv_ids, s))
    ]
    # Padding keys come after every query of a causal row.
    hidden = s % ROWS == 0 or (options.causal and extras.positions_bt is None)
    return arrays, Mask(options.causal, options.window, segments, None if hidden else s)


def _table(q_btnh, k_bskh, extras, options, rows, chunk, by_keys=False):
    (b, t), s = q_btnh.shape[:2], k_bskh.shape[1]
    table = jnp.asarray(ranges(options, extras, t, s, rows=rows, chunk=chunk, by_keys=by_keys))
    return jnp.broadcast_to(table, (b, *table.shape[1:]))
