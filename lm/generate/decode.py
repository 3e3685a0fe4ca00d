"""Tokens from a model: prefill and decoding with a key/value cache in one compiled function.

Prompts are padded on the right and every row counts its own positions, so what stands in a padding
slot is overwritten before the causal mask uncovers it. A row's tokens depend on its prompt and its
key alone and are the same in any batch, but for the rounding of sums, whose order depends on
shapes. (Capacity-bounded experts are the exception: there tokens compete for places.)

Shapes are rounded up to powers of two, and all else but the model is an argument of the compiled
function, so that repeated calls compile rarely.
"""

import contextlib
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm import model
from lm.errors import UserError, check_positive
from lm.generate.sampling import Filters, Sampling, sample
from lm.parallel import sharding

SMALLEST = 16  # prompt and output lengths below this share one program


class Result(NamedTuple):
    """What was generated for one prompt.

    tokens     ids without the prompt's; where a stop token ended the row, it is the last of them
    logprobs   of each token, natural, under the model itself: before penalty, temperature, filters
    finished   'stop' (a stop token), 'max_tokens', 'context' (no room left), 'ended' (by the
               caller); None while it goes on
    """

    tokens: list[int]
    logprobs: list[float]
    finished: str | None


def generate(
    config: model.Config,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    context: int,
    max_tokens: int,
    sampling: Sampling | None = None,
    key: jax.Array | int = 0,
    stop_tokens: Sequence[int] = (),
    cache_dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> list[Result]:
    """Continues each prompt by at most `max_tokens` tokens. One Result per prompt.

    Args:
        params: in the format to compute in.
        prompts: token ids, at least one per prompt.
        context: most tokens that prompt and continuation may have together, as a rule the length
            of the training sequences; a row that reaches it ends.
        sampling: default: Sampling(), temperature 1.
        key: a seed or a jax.random.key, folded with the row's index; or an array of keys, one per
            prompt. Step t of a row uses its key folded with t.
        stop_tokens: ids that end a row.
        cache_dtype: of the keys and values kept; default: that of the parameters.
        mesh: the one on which `params` lie; default: that of the surrounding `sharding.use`.

    Raises:
        UserError: an empty prompt, one longer than the context, a token outside the vocabulary.
    """
    results: list[Result] = []
    for results in stream(  # noqa: B007
        config,
        params,
        prompts,
        context=context,
        max_tokens=max_tokens,
        sampling=sampling,
        key=key,
        stop_tokens=stop_tokens,
        cache_dtype=cache_dtype,
        mesh=mesh,
        chunk=max_tokens,
    ):
        pass
    return results


def stream(
    config: model.Config,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    context: int,
    max_tokens: int,
    sampling: Sampling | None = None,
    key: jax.Array | int = 0,
    stop_tokens: Sequence[int] = (),
    cache_dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    chunk: int = 16,
    ended: AbstractSet[int] = frozenset(),
) -> Iterator[list[Result]]:
    """As `generate`, but yields the results so far after every `chunk` tokens.

    Between two yields the caller may put indices of prompts into `ended`: these rows go no further.
    The last results are all finished. The tokens are those of `generate`, whatever the chunk.
    """
    mesh = mesh or sharding.active_mesh()
    check_positive(max_tokens=max_tokens, context=context, chunk=chunk)
    _check_prompts(config, prompts, context)
    if not prompts:
        return
    request = _request(prompts, context, max_tokens, sampling or Sampling(), key, stop_tokens, mesh)
    cache_length = min(_bucket(request.length_b.max() + max_tokens), context)
    static = {"config": config, "mesh": mesh}
    finished: list[str | None] = [None] * len(prompts)
    state = None
    for until in range(chunk, max_tokens + chunk, chunk):
        steps = np.int32(min(until, max_tokens))
        if state is None:
            state = _start(
                params,
                request,
                steps,
                **static,
                shape=(_bucket(max_tokens), cache_length),
                cache_dtype=cache_dtype or jax.tree.leaves(params)[0].dtype.name,
            )
        else:
            state = _resume(params, request, state, steps, **static)
        results = _results(state, request, max_tokens, finished)
        yield results
        if all(result.finished for result in results):
            return
        for row in ended:
            finished[row] = finished[row] or "ended"
            request.limit_b[row] = 0
        if all(finished):
            yield [result._replace(finished=why) for result, why in zip(results, finished)]
            return


def _check_prompts(config: model.Config, prompts: Sequence[Sequence[int]], context: int) -> None:
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i} is empty; give it at least one token.")
        if len(prompt) >= context:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, which leaves no room in context={context}; "
                f"shorten it, or give a context above {len(prompt)}, knowing that a model is at a "
                "loss beyond the length it was trained on."
            )
        outside = [token for token in prompt if not 0 <= token < config.vocab]
        if outside:
            raise UserError(
                f"prompt {i} has token {outside[0]}, and the model's vocabulary ends at "
                f"{config.vocab - 1}; use the tokenizer that the model was trained with."
            )


class _Request(NamedTuple):
    """What the caller asks, as arrays: B rows, of which the last ones may be padding, and P tokens
    for the longest prompt."""

    prompts_bp: np.ndarray
    length_b: np.ndarray  # of each prompt
    limit_b: (
        np.ndarray
    )  # most tokens to generate: 0 for rows of padding and those the caller has ended
    keys_b: jax.Array
    stops_s: np.ndarray
    filters: Filters


class _State(NamedTuple):
    """Carried from step to step. count_b tokens have been generated in each row, which is `step` in
    rows still running."""

    step: jax.Array
    tokens_bt: jax.Array
    logprobs_bt: jax.Array
    count_b: jax.Array
    stopped_b: jax.Array
    seen_bv: jax.Array | None  # tokens of prompt and text; only where the filters need it
    cache: Any


def _request(
    prompts: Sequence[Sequence[int]],
    context: int,
    max_tokens: int,
    sampling: Sampling,
    key: jax.Array | int,
    stop_tokens: Sequence[int],
    mesh: jax.sharding.Mesh | None,
) -> _Request:
    longest = max(len(prompt) for prompt in prompts)
    rows = _bucket(len(prompts), 1)
    if mesh is not None:
        ways = np.prod(
            [mesh.shape[axis] for axis in sharding.ACTIVATIONS["batch"]], dtype=int
        ).item()
        rows = -(-rows // ways) * ways
    prompts_bp = np.zeros((rows, min(_bucket(longest), context)), np.int32)
    length_b, limit_b = np.ones(rows, np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        prompts_bp[row, : len(prompt)] = prompt
        length_b[row] = len(prompt)
        limit_b[row] = min(max_tokens, context - len(prompt))
    key = jax.random.key(key) if isinstance(key, int) else key
    if key.ndim == 0:
        keys_b = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(rows))
    else:
        keys_b = key[np.arange(rows) % len(prompts)]
    stops_s = np.array(sorted(set(stop_tokens)), np.int32)
    return _Request(prompts_bp, length_b, limit_b, keys_b, stops_s, sampling.filters())


def _bucket(size: int, smallest: int = SMALLEST) -> int:
    """The power of two at or above `size`."""
    return max(smallest, 1 << (int(size) - 1).bit_length())


def _on(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager[None]:
    # The mesh is a static argument, for jit would not notice a change of the surrounding `use`.
    return contextlib.nullcontext() if mesh is None else sharding.use(mesh, sharding.WHOLE_ROWS)


@partial(jax.jit, static_argnames=("config", "mesh", "shape", "cache_dtype"))
def _start(
    params: Any,
    request: _Request,
    until: jax.Array,
    *,
    config: model.Config,
    mesh: jax.sharding.Mesh | None,
    shape: tuple[int, int],
    cache_dtype: str,
) -> _State:
    """Prefill, the first token of each row, and decoding up to step `until`.

    `shape`: tokens that there is room for in the output and in the cache.
    """
    with _on(mesh):
        rows, prompt_length = request.prompts_bp.shape
        position_p = jnp.arange(prompt_length)
        output = model.forward(
            config,
            params,
            sharding.shard(request.prompts_bp, "batch", "seq"),
            positions_bt=jnp.broadcast_to(position_p, (rows, prompt_length)),
            cache=model.init_cache(config, rows, shape[1], cache_dtype),
        )
        state = _State(
            step=jnp.int32(0),
            tokens_bt=jnp.zeros((rows, shape[0]), jnp.int32),
            logprobs_bt=jnp.zeros((rows, shape[0]), jnp.float32),
            count_b=jnp.zeros(rows, jnp.int32),
            stopped_b=jnp.zeros(rows, bool),
            seen_bv=_seen(request, config.vocab),
            cache=output.cache,
        )
        last_b11 = (request.length_b - 1)[:, None, None]
        hidden_b1d = jnp.take_along_axis(output.hidden_btd, last_b11, axis=1)
        state = _emit(request, state, model.logits(config, params, hidden_b1d)[:, 0])
        return _decode(config, mesh, params, request, state, until)


@partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames=("state",))
def _resume(
    params: Any,
    request: _Request,
    state: _State,
    until: jax.Array,
    *,
    config: model.Config,
    mesh: jax.sharding.Mesh | None,
) -> _State:
    """Decoding from `state` up to step `until`."""
    with _on(mesh):
        return _decode(config, mesh, params, request, state, until)


def _decode(
    config: model.Config,
    mesh: jax.sharding.Mesh | None,
    params: Any,
    request: _Request,
    state: _State,
    until: jax.Array,
) -> _State:
    def goes_on(state: _State) -> jax.Array:
        return (state.step < until) & jnp.any(_running(request, state))

    def step(state: _State) -> _State:
        last_b1 = jax.lax.dynamic_slice_in_dim(state.tokens_bt, state.step - 1, 1, axis=1)
        position_b1 = (request.length_b + state.count_b - 1)[:, None]
        output = model.forward(
            config,
            params,
            sharding.shard(last_b1, "batch", "seq"),
            positions_bt=position_b1,
            cache=state.cache,
        )
        logits_bv = model.logits(config, params, output.hidden_btd)[:, 0]
        return _emit(request, state._replace(cache=output.cache), logits_bv)

    state = jax.lax.while_loop(goes_on, step, state)
    if mesh is None:
        return state
    # Every process reads these; the cache stays where it is.
    everywhere = NamedSharding(mesh, PartitionSpec())
    read = {
        name: getattr(state, name) for name in ("tokens_bt", "logprobs_bt", "count_b", "stopped_b")
    }
    return state._replace(**jax.lax.with_sharding_constraint(read, everywhere))


def _emit(request: _Request, state: _State, logits_bv: jax.Array) -> _State:
    """Chooses and writes down the next token of each running row; the others get token 0, which
    nothing reads."""
    keys_b = jax.vmap(jax.random.fold_in, (0, None))(request.keys_b, state.step)
    token_b = sample(logits_bv, request.filters, keys_b, state.seen_bv)
    logprob_bv = jax.nn.log_softmax(logits_bv.astype(jnp.float32), axis=-1)
    logprob_b = jnp.take_along_axis(logprob_bv, token_b[:, None], axis=-1)[:, 0]
    running_b = _running(request, state)
    token_b = jnp.where(running_b, token_b, 0)
    seen_bv = state.seen_bv
    if seen_bv is not None:
        seen_bv = seen_bv.at[jnp.arange(len(token_b)), token_b].set(True)
    return state._replace(
        step=state.step + 1,
        tokens_bt=state.tokens_bt.at[:, state.step].set(token_b),
        logprobs_bt=state.logprobs_bt.at[:, state.step].set(logprob_b),
        count_b=state.count_b + running_b,
        stopped_b=state.stopped_b
        | (running_b & jnp.any(token_b[:, None] == request.stops_s, axis=-1)),
        seen_bv=seen_bv,
    )


def _running(request: _Request, state: _State) -> jax.Array:
    return ~state.stopped_b & (state.count_b < request.limit_b)


def _seen(request: _Request, vocab: int) -> jax.Array | None:
    """Which tokens each prompt holds, [B, V]."""
    if "repetition_penalty" not in request.filters:
        return None
    rows, length = request.prompts_bp.shape
    # Padding is sent outside the array, where a scatter drops it.
    tokens_bp = jnp.where(jnp.arange(length) < request.length_b[:, None], request.prompts_bp, vocab)
    return (
        jnp.zeros((rows, vocab), bool)
        .at[jnp.arange(rows)[:, None], tokens_bp]
        .set(True, mode="drop")
    )


def _results(
    state: _State, request: _Request, max_tokens: int, finished: Sequence[str | None]
) -> list[Result]:
    count_b, stopped_b = np.asarray(state.count_b), np.asarray(state.stopped_b)
    tokens_bt, logprobs_bt = np.asarray(state.tokens_bt), np.asarray(state.logprobs_bt)
    results = []
    for row, why in enumerate(finished):
        count = int(count_b[row])
        if stopped_b[row]:
            why = "stop"
        elif why is None and count >= request.limit_b[row]:
            why = "max_tokens" if count == max_tokens else "context"
        results.append(
            Result(tokens_bt[row, :count].tolist(), logprobs_bt[row, :count].tolist(), why)
        )
    return results
