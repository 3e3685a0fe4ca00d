"""Two ways for queries to meet keys on other devices, inside shard_map over `axis_name`.

Ring: keys and values go round, and what each device makes of a part is merged by the log of the
softmax's denominator (Ring Attention, arXiv:2310.01889); while one part is at work the next one is
on its way. Gathered: each device fetches all keys and values first (Llama 3, arXiv:2407.21783).
The arrays lie as `placement` says.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.attention import flash_attention
from kernels_pallas.attention.op import SAVED, gradients_of_part
from kernels_pallas.ring_attention.placement import halves, placement
from kernels_pallas.varying import varying_alike

HIDDEN = -1e30  # the log of the denominator where nothing is seen


class Options(NamedTuple):
    """Of each call of attention on a part."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float | None


class Keys(NamedTuple):
    """What goes round."""

    k_bskh: jax.Array
    v_bskh: jax.Array
    segment_ids: jax.Array | None


def ring_attention(
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    *,
    axis_name: str,
    causal: bool = True,
    window: int | None = None,
    sink_tokens: int = 0,
    segment_ids: jax.Array | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    alibi: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """out_btnh of this device's queries over the keys of all; memory is that of a device's part.

    The arguments are those of `flash_attention`; `alibi` gets no gradient. A device's T must be
    even.

    Raises:
      ValueError: for an odd T, and for `sink_tokens`, which is gathered_attention's alone.
    """
    _check(q_btnh)
    if sink_tokens:
        raise ValueError(
            f"sink_tokens={sink_tokens}: a ring does not know where documents begin; "
            "use gathered_attention."
        )
    options = Options(causal, window, softcap, scale)
    arrays = varying_alike(q_btnh, k_btkh, v_btkh)
    out_btnh, lse_btn = _ring(options, axis_name, *arrays, segment_ids, alibi)
    if sinks is not None:
        # The sink joins the denominator once, when the ring is closed.
        kept_btn = jax.nn.sigmoid(lse_btn - sinks.astype(jnp.float32))
        out_btnh = out_btnh * kept_btn[..., None].astype(out_btnh.dtype)
    return out_btnh


def gathered_attention(
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    *,
    axis_name: str,
    segment_ids: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """The same by one gather of the keys and values, which every device then holds whole; the other
    arguments are those of `flash_attention`."""
    _check(q_btnh)
    b, t = q_btnh.shape[:2]
    devices = jax.lax.axis_size(axis_name)
    order = jnp.argsort(placement(t * devices, devices))

    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x, axis_name, axis=1, tiled=True)[:, order]

    index_t = jnp.concatenate(_indices(jax.lax.axis_index(axis_name), devices, t // 2))
    return flash_attention(
        q_btnh,
        gather(k_btkh),
        gather(v_btkh),
        positions=jnp.broadcast_to(index_t, (b, t)),
        segment_ids=segment_ids,
        kv_segment_ids=None if segment_ids is None else gather(segment_ids),
        **options,
    )


def _check(q_btnh: jax.Array) -> None:
    if q_btnh.shape[1] % 2:
        raise ValueError(
            f"a device holds two halves of equal length, not {q_btnh.shape[1]} tokens; the length "
            "must be a multiple of twice the devices."
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(options, axis_name, q_btnh, k_btkh, v_btkh, segment_ids, alibi):
    return _forward(options, axis_name, q_btnh, k_btkh, v_btkh, segment_ids, alibi)[0]


def _forward(options, axis_name, q_btnh, k_btkh, v_btkh, segment_ids, alibi):
    """Each half of the queries meets each half of the keys that it can see, as they come round."""
    merged = jnp.zeros(q_btnh.shape, jnp.float32), jnp.full(q_btnh.shape[:3], HIDDEN, jnp.float32)
    merged = tuple(varying_alike(*merged, q_btnh)[:2])

    def meet(merged, keys, source):
        def part(pair, q, keys, offset):
            return flash_attention(
                q,
                keys.k_bskh,
                keys.v_bskh,
                positions=offset,
                **_segments(segment_ids, keys, pair),
                alibi=alibi,
                return_lse=True,
                **options._asdict(),
            )

        return _pairs(options, axis_name, source, q_btnh, keys, merged, part, _merge)

    def step(carry, i):
        merged, keys = carry
        onward = _pass_on(keys, axis_name)
        source = (jax.lax.axis_index(axis_name) - i) % jax.lax.axis_size(axis_name)
        return (meet(merged, keys, source), onward), None

    keys = Keys(k_btkh, v_btkh, segment_ids)
    steps = jnp.arange(jax.lax.axis_size(axis_name))
    ((out_btnh, lse_btn), _), _ = jax.lax.scan(step, (merged, keys), steps)
    out_btnh, lse_btn = checkpoint_name((out_btnh.astype(q_btnh.dtype), lse_btn), SAVED)
    return (out_btnh, lse_btn), (q_btnh, k_btkh, v_btkh, segment_ids, alibi, out_btnh, lse_btn)


def _backward(options, axis_name, kept, cotangents):
    """Keys go round once more, and the gradients of keys and values with them, back home."""
    q_btnh, k_btkh, v_btkh, segment_ids, alibi, out_btnh, lse_btn = kept
    dout_btnh, dlse_btn = cotangents
    rows = q_btnh, out_btnh, lse_btn, dout_btnh, dlse_btn
    sums = [jnp.zeros(x.shape, jnp.float32) for x in (q_btnh, k_btkh, v_btkh)]
    dq, dk, dv = varying_alike(*sums, q_btnh)[:3]

    def step(carry, i):
        dq, dkv, keys = carry
        onward = _pass_on(keys, axis_name)
        source = (jax.lax.axis_index(axis_name) - i) % jax.lax.axis_size(axis_name)

        def part(pair, rows, keys, offset):
            q, out, lse, dout, dlse = rows
            return gradients_of_part(
                *(q, keys.k_bskh, keys.v_bskh, out, lse, dout, dlse),
                positions=offset,
                **_segments(segment_ids, keys, pair),
                alibi=alibi,
                **options._asdict(),
            )

        dq, dkv = _pairs(options, axis_name, source, rows, keys, (dq, dkv), part, _add)
        return (dq, _pass_on(dkv, axis_name), onward), None

    keys = Keys(k_btkh, v_btkh, segment_ids)
    steps = jnp.arange(jax.lax.axis_size(axis_name))
    (dq, (dk, dv), _), _ = jax.lax.scan(step, (dq, (dk, dv), keys), steps)
    dq, dk, dv = dq.astype(q_btnh.dtype), dk.astype(k_btkh.dtype), dv.astype(v_btkh.dtype)
    return dq, dk, dv, None, None


_ring.defvjp(_forward, _backward)


def _pairs(options, axis_name, source, rows, keys, carry, part, add):
    """`carry` after each half of the rows has met each half of the keys of device `source`.

    part(pair, rows, keys, offset) is called where a query can see a key; `offset` are the indices
    of the queries, counted from the first of the keys. add(pair, carry, result) takes it in.
    """
    devices = jax.lax.axis_size(axis_name)
    half = keys.k_bskh.shape[1] // 2
    b = keys.k_bskh.shape[0]
    own, theirs = halves(jax.lax.axis_index(axis_name), devices), halves(source, devices)
    for i in range(2):
        for j in range(2):
            apart = own[i] - theirs[j]  # in halves
            seen = apart >= 0 if options.causal else apart == apart
            if options.window is not None:
                seen &= (apart - 1) * half + 1 < options.window
            offset = jnp.broadcast_to(apart * half + jnp.arange(half), (b, half))

            def meet(carry, rows, keys, offset, pair=(i, j)):
                return add(pair, carry, part(pair, rows, keys, offset))

            given = carry, _half(rows, i), _half(keys, j), offset
            carry = jax.lax.cond(seen, meet, lambda carry, *_: carry, *given)
    return carry


def _merge(pair, merged, new):
    """Two softmaxes over different keys as one."""
    (out, lse), (more, lse_more) = _half(merged, pair[0]), new
    both = jnp.logaddexp(lse, lse_more)
    out = out * jnp.exp(lse - both)[..., None] + more * jnp.exp(lse_more - both)[..., None]
    return tuple(_put(x, y, pair[0]) for x, y in zip(merged, (out, both), strict=True))


def _add(pair, sums, new):
    dq, (dk, dv) = sums
    dq = _put(dq, _half(dq, pair[0]) + new[0], pair[0])
    dk, dv = (_put(x, _half(x, pair[1]) + y, pair[1]) for x, y in ((dk, new[1]), (dv, new[2])))
    return dq, (dk, dv)


def _segments(segment_ids, keys, pair):
    if segment_ids is None:
        return {}
    return {"segment_ids": _half(segment_ids, pair[0]), "kv_segment_ids": keys.segment_ids}


def _indices(device, devices, half):
    """Of the tokens of a device's two halves."""
    return [number * half + jnp.arange(half) for number in halves(device, devices)]


def _half(tree, i):
    return jax.tree.map(lambda x: jnp.split(x, 2, axis=1)[i], tree)


def _put(x, half, i):
    """`x` with one half of its tokens replaced."""
    parts = jnp.split(x, 2, axis=1)
    parts[i] = half
    return jnp.concatenate(parts, axis=1)


def _pass_on(tree, axis_name):
    devices = jax.lax.axis_size(axis_name)
    return jax.lax.ppermute(tree, axis_name, [(c, (c + 1) % devices) for c in range(devices)])
