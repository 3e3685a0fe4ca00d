"""Context-parallel attention, inside shard_map over `axis_name`, in two implementations.

Ring: keys and values rotate around the devices, overlapping with compute; partial results are
merged by their log-sum-exp (Ring Attention, arXiv:2310.01889). Gathered: each device all-gathers
keys and values first (Llama 3, arXiv:2407.21783). Sequences are in the order of `placement`.
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

HIDDEN = -1e30  # log-sum-exp without visible keys


class Options(NamedTuple):
    """Static options of each partial attention call."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float | None


class Keys(NamedTuple):
    """Arrays that rotate around the devices."""

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
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Returns out_btnh of this device's queries over the keys of all devices.

    Takes memory for one device's keys and values. Arguments as in `flash_attention`; `alibi` gets
    no gradient. T, the tokens of a device, must be even.

    Raises:
      ValueError: T is odd, or `sink_tokens` is set, which only gathered_attention supports.
    """
    _check(q_btnh)
    if sink_tokens:
        raise ValueError(
            f"sink_tokens={sink_tokens}: ring_attention has no positions of document starts; use "
            "gathered_attention."
        )
    options = Options(causal, window, softcap, scale)
    arrays = varying_alike(q_btnh, k_btkh, v_btkh)
    out_btnh, lse_btn = _ring(options, axis_name, *arrays, segment_ids, alibi)
    if sinks is not None:
        # The sink joins the denominator once, after the last step of the ring.
        share_btn = jax.nn.sigmoid(lse_btn - sinks.astype(jnp.float32))
        out_btnh = out_btnh * share_btn[..., None].astype(out_btnh.dtype)
        lse_btn = jnp.logaddexp(lse_btn, sinks.astype(jnp.float32))
    return (out_btnh, lse_btn) if return_lse else out_btnh


def gathered_attention(
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    *,
    axis_name: str,
    segment_ids: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """As `ring_attention`, by one all-gather: every device holds the keys and values of the whole
    sequence. Other arguments as in `flash_attention`."""
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
            f"a device holds two halves of equal length, not {q_btnh.shape[1]} tokens; make the "
            "sequence length a multiple of twice the number of devices."
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(options, axis_name, q_btnh, k_btkh, v_btkh, segment_ids, alibi):
    return _forward(options, axis_name, q_btnh, k_btkh, v_btkh, segment_ids, alibi)[0]


def _forward(options, axis_name, q_btnh, k_btkh, v_btkh, segment_ids, alibi):
    """Attends from each half of the queries to each visible half of the keys, step by step."""
    merged = jnp.zeros(q_btnh.shape, jnp.float32), jnp.full(q_btnh.shape[:3], HIDDEN, jnp.float32)
    merged = tuple(varying_alike(*merged, q_btnh)[:2])

    def attend(merged, keys, source):
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
        next_keys = _rotate(keys, axis_name)
        source = (jax.lax.axis_index(axis_name) - i) % jax.lax.axis_size(axis_name)
        return (attend(merged, keys, source), next_keys), None

    keys = Keys(k_btkh, v_btkh, segment_ids)
    steps = jnp.arange(jax.lax.axis_size(axis_name))
    ((out_btnh, lse_btn), _), _ = jax.lax.scan(step, (merged, keys), steps)
    out_btnh, lse_btn = checkpoint_name((out_btnh.astype(q_btnh.dtype), lse_btn), SAVED)
    return (out_btnh, lse_btn), (q_btnh, k_btkh, v_btkh, segment_ids, alibi, out_btnh, lse_btn)


def _backward(options, axis_name, residuals, cotangents):
    """Rotates keys once more, with the gradients of keys and values, which end on their device."""
    q_btnh, k_btkh, v_btkh, segment_ids, alibi, out_btnh, lse_btn = residuals
    dout_btnh, dlse_btn = cotangents
    rows = q_btnh, out_btnh, lse_btn, dout_btnh, dlse_btn
    sums = [jnp.zeros(x.shape, jnp.float32) for x in (q_btnh, k_btkh, v_btkh)]
    dq, dk, dv = varying_alike(*sums, q_btnh)[:3]

    def step(carry, i):
        dq, dkv, keys = carry
        next_keys = _rotate(keys, axis_name)
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
        return (dq, _rotate(dkv, axis_name), next_keys), None

    keys = Keys(k_btkh, v_btkh, segment_ids)
    steps = jnp.arange(jax.lax.axis_size(axis_name))
    (dq, (dk, dv), _), _ = jax.lax.scan(step, (dq, (dk, dv), keys), steps)
    dq, dk, dv = dq.astype(q_btnh.dtype), dk.astype(k_btkh.dtype), dv.astype(v_btkh.dtype)
    return dq, dk, dv, None, None


_ring.defvjp(_forward, _backward)


def _pairs(options, axis_name, source, rows, keys, carry, part, add):
    """Folds all pairs of a half of the rows and a half of the keys of device `source` into `carry`.

    Calls part(pair, rows, keys, offset) for pairs in which some query sees a key; `offset` are the
    query indices relative to the first key. add(pair, carry, result) returns the new carry.
    """
    devices = jax.lax.axis_size(axis_name)
    half = keys.k_bskh.shape[1] // 2
    b = keys.k_bskh.shape[0]
    q_halves, k_halves = halves(jax.lax.axis_index(axis_name), devices), halves(source, devices)
    for i in range(2):
        for j in range(2):
            apart = q_halves[i] - k_halves[j]  # in halves
            seen = apart >= 0 if options.causal else apart == apart
            if options.window is not None:
                seen &= (apart - 1) * half + 1 < options.window
            offset = jnp.broadcast_to(apart * half + jnp.arange(half), (b, half))

            def attend(carry, rows, keys, offset, pair=(i, j)):
                return add(pair, carry, part(pair, rows, keys, offset))

            arguments = carry, _half(rows, i), _half(keys, j), offset
            carry = jax.lax.cond(seen, attend, lambda carry, *_: carry, *arguments)
    return carry


def _merge(pair, merged, new):
    """Merges the partial result of one half of the queries by log-sum-exp."""
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
    """Sequence indices of the tokens in a device's two halves."""
    return [number * half + jnp.arange(half) for number in halves(device, devices)]


def _half(tree, i):
    return jax.tree.map(lambda x: jnp.split(x, 2, axis=1)[i], tree)


def _put(x, half, i):
    """x with half i of its tokens replaced."""
    parts = jnp.split(x, 2, axis=1)
    parts[i] = half
    return jnp.concatenate(parts, axis=1)


def _rotate(tree, axis_name):
    devices = jax.lax.axis_size(axis_name)
    return jax.lax.ppermute(tree, axis_name, [(c, (c + 1) % devices) for c in range(devices)])
