"""Token generation: prefill and decoding with a KV cache in one compiled function.

Prompts are padded on the right, and every row has its own positions. The tokens of a row depend
only on its prompt and its key and are the same in any batch, up to rounding of sums, whose order
depends on shapes. (Experts with a capacity are the exception: their tokens compete for slots.)

Shapes are rounded up to powers of two, and everything but the model's structure is an argument of
the compiled function, so repeated calls rarely compile.
"""

import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError, check_seed, check_size
from lm.generate.sampling import Filters, Sampling, sample
from lm.model import Config, Model
from lm.parallel import sharding

SMALLEST = 16  # prompt and output lengths below this share one program


class Result(NamedTuple):
    """The continuation of one prompt.

    tokens     ids after the prompt; a stop token that ended the row is the last one
    logprobs   natural log-probability of each token under the model, before penalty, temperature
               and filters
    finished   'stop' (a stop token), 'max_tokens', 'context' (the context is full), 'ended' (by the
               caller); None while it continues
    """

    tokens: list[int]
    logprobs: list[float]
    finished: str | None


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    context: int,
    max_tokens: int,
    sampling: Sampling | None = None,
    key: jax.Array | int = 0,
    stop_tokens: Sequence[int] = (),
    cache_dtype: str | None = None,
) -> list[Result]:
    """Continues each prompt by at most `max_tokens` tokens. One Result per prompt.

    Args:
        model: with weights in the dtype of arithmetic (see `Model.cast`).
        prompts: token ids, at least one per prompt.
        context: most tokens of prompt and continuation, usually the sequence length of training; a
            row that reaches it ends.
        sampling: default: Sampling(), temperature 1.
        key: a seed or a jax.random.key, folded with the index of the row; or an array of keys, one
            per prompt. Step t of a row uses its key folded with t.
        stop_tokens: ids that end a row.
        cache_dtype: of the KV cache; default: that of the weights.

    Raises:
        UserError: an empty prompt, one longer than the context, a token outside the vocabulary,
            logits that are not finite.
    """
    results: list[Result] = []
    for results in stream(  # noqa: B007
        model,
        prompts,
        context=context,
        max_tokens=max_tokens,
        sampling=sampling,
        key=key,
        stop_tokens=stop_tokens,
        cache_dtype=cache_dtype,
        chunk=max_tokens,
    ):
        pass
    return results


def stream(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    context: int,
    max_tokens: int,
    sampling: Sampling | None = None,
    key: jax.Array | int = 0,
    stop_tokens: Sequence[int] = (),
    cache_dtype: str | None = None,
    chunk: int = 16,
    ended: AbstractSet[int] = frozenset(),
) -> Iterator[list[Result]]:
    """As `generate`, but yields the results so far after every `chunk` tokens.

    Between two yields the caller may add indices of prompts to `ended`: these rows end. The last
    results are all finished. The tokens do not depend on `chunk`.
    """
    check_size(max_tokens=max_tokens, context=context, chunk=chunk)
    if not isinstance(key, jax.Array):
        check_seed(seed=key)
    check_prompts(model.config, prompts, context)
    max_tokens = min(max_tokens, context)  # a row ends where its context is full
    if not prompts:
        return
    request = _make_request(
        prompts, context, max_tokens, sampling or Sampling(), key, stop_tokens, model.mesh
    )
    cache_length = min(_bucket(request.length_b.max() + max_tokens), context)
    cache = _empty_cache(model, len(request.length_b), cache_length, cache_dtype)
    yield from _run(model, request, cache, len(prompts), max_tokens, chunk, ended)


def _run(
    model: Model,
    request: "Request",
    cache: Any,
    rows: int,
    max_tokens: int,
    chunk: int,
    ended: AbstractSet[int],
) -> Iterator[list[Result]]:
    """The results after every `chunk` tokens of the first `rows` rows of a request."""
    finished: list[str | None] = [None] * rows
    state = None
    for until in range(chunk, max_tokens + chunk, chunk):
        steps = np.int32(min(until, max_tokens))
        if state is None:
            state = _start(model, request, cache, steps, size=_bucket(max_tokens))
        else:
            state = _resume(model, request, state, steps)
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


@partial(jax.jit, static_argnames=("rows", "length", "dtype"))
def _empty_cache(model: Model, rows: int, length: int, dtype: str | None = None) -> Any:
    """Caches for `rows` rows of at most `length` tokens."""
    with model.on_mesh(sharding.UNSPLIT_SEQUENCE):
        return model.init_cache(rows, length, dtype)


def check_prompts(config: Config, prompts: Sequence[Sequence[int]], context: int) -> None:
    """Raises UserError for prompts that cannot be continued."""
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i} is empty; give it at least one token.")
        if len(prompt) >= context:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, which leaves no room in context={context}; "
                f"shorten it, or give a context above {len(prompt)}; beyond the sequence length "
                "of training the output is poor."
            )
        outside = [token for token in prompt if not 0 <= token < config.vocab]
        if outside:
            raise UserError(
                f"prompt {i} has token {outside[0]}, and the model's vocabulary ends at "
                f"{config.vocab - 1}; use the tokenizer that the model was trained with."
            )


class Request(NamedTuple):
    """The request as arrays: B rows, of which the last may be padding, and P tokens for the longest
    prompt."""

    prompts_bp: np.ndarray
    length_b: np.ndarray  # of each prompt
    limit_b: np.ndarray  # most tokens to generate; 0 for padding rows and rows that were ended
    keys_b: jax.Array
    stops_s: np.ndarray
    filters: Filters


class _State(NamedTuple):
    """Carried from step to step. `count_b` is the number of tokens generated in each row, which
    equals `step` in rows that are still running."""

    step: jax.Array
    tokens_bt: jax.Array
    logprobs_bt: jax.Array
    count_b: jax.Array
    stopped_b: jax.Array
    seen_bv: jax.Array | None  # tokens of prompt and text; only where the filters need it
    cache: Any


def _make_request(
    prompts: Sequence[Sequence[int]],
    context: int,
    max_tokens: int,
    sampling: Sampling,
    key: jax.Array | int,
    stop_tokens: Sequence[int],
    mesh: jax.sharding.Mesh | None,
) -> Request:
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
    key = key if isinstance(key, jax.Array) else jax.random.key(int(key))
    if key.ndim == 0:
        keys_b = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(rows))
    else:
        keys_b = key[np.arange(rows) % len(prompts)]
    stops_s = np.array(sorted(set(stop_tokens)), np.int32)
    return Request(prompts_bp, length_b, limit_b, keys_b, stops_s, sampling.filters())


def _bucket(size: int, smallest: int = SMALLEST) -> int:
    """The power of two at or above `size`."""
    return max(smallest, 1 << (int(size) - 1).bit_length())


@partial(jax.jit, static_argnames="size", donate_argnames="cache")
def _start(model: Model, request: Request, cache: Any, until: jax.Array, *, size: int) -> _State:
    """Prefill, the first token of each row, and decoding up to step `until`. `size`: capacity of
    the output in tokens."""
    with model.on_mesh(sharding.UNSPLIT_SEQUENCE):
        rows, prompt_length = request.prompts_bp.shape
        position_p = jnp.arange(prompt_length)
        output = model(
            sharding.shard(request.prompts_bp, "batch", "seq"),
            positions_bt=jnp.broadcast_to(position_p, request.prompts_bp.shape),
            mask_bt=position_p < request.length_b[:, None],
            cache=cache,
        )
        state = _State(
            step=jnp.int32(0),
            tokens_bt=jnp.zeros((rows, size), jnp.int32),
            logprobs_bt=jnp.zeros((rows, size), jnp.float32),
            count_b=jnp.zeros(rows, jnp.int32),
            stopped_b=jnp.zeros(rows, bool),
            seen_bv=_seen(request, model.config.vocab),
            cache=output.cache,
        )
        last_b11 = (request.length_b - 1)[:, None, None]
        hidden_b1d = jnp.take_along_axis(output.hidden_btd, last_b11, axis=1)
        state = _emit(request, state, model.logits(hidden_b1d)[:, 0])
        return _decode(model, request, state, until)


@partial(jax.jit, donate_argnames=("state",))
def _resume(model: Model, request: Request, state: _State, until: jax.Array) -> _State:
    """Decoding from `state` up to step `until`."""
    with model.on_mesh(sharding.UNSPLIT_SEQUENCE):
        return _decode(model, request, state, until)


def _decode(model: Model, request: Request, state: _State, until: jax.Array) -> _State:
    def unfinished(state: _State) -> jax.Array:
        return (state.step < until) & jnp.any(_running(request, state))

    def step(state: _State) -> _State:
        last_b1 = jax.lax.dynamic_slice_in_dim(state.tokens_bt, state.step - 1, 1, axis=1)
        position_b1 = (request.length_b + state.count_b - 1)[:, None]
        output = model(
            sharding.shard(last_b1, "batch", "seq"), positions_bt=position_b1, cache=state.cache
        )
        logits_bv = model.logits(output.hidden_btd)[:, 0]
        return _emit(request, state._replace(cache=output.cache), logits_bv)

    state = jax.lax.while_loop(unfinished, step, state)
    if model.mesh is None:
        return state
    # Every process reads these; the cache stays sharded.
    everywhere = sharding.replicated(model.mesh)
    read = {
        name: getattr(state, name) for name in ("tokens_bt", "logprobs_bt", "count_b", "stopped_b")
    }
    return state._replace(**jax.lax.with_sharding_constraint(read, everywhere))


def _emit(request: Request, state: _State, logits_bv: jax.Array) -> _State:
    """Samples and stores the next token of each running row; the other rows get token 0, which is
    not read."""
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


def _running(request: Request, state: _State) -> jax.Array:
    return ~state.stopped_b & (state.count_b < request.limit_b)


def _seen(request: Request, vocab: int) -> jax.Array | None:
    """Tokens that occur in each prompt, bool [B, V]."""
    if "repetition_penalty" not in request.filters:
        return None
    rows, length = request.prompts_bp.shape
    # Padding gets an index outside the array, which the scatter drops.
    tokens_bp = jnp.where(jnp.arange(length) < request.length_b[:, None], request.prompts_bp, vocab)
    return (
        jnp.zeros((rows, vocab), bool)
        .at[jnp.arange(rows)[:, None], tokens_bp]
        .set(True, mode="drop")
    )


def _results(
    state: _State, request: Request, max_tokens: int, finished: Sequence[str | None]
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
        logprobs = logprobs_bt[row, :count].tolist()
        if any(map(math.isnan, logprobs)):
            raise UserError(
                f"The model's logits are not finite after prompt {row}: weights are not finite, or "
                "arithmetic overflows. Try float32 (--compute float32) or an earlier checkpoint "
                "(--step)."
            )
        results.append(Result(tokens_bt[row, :count].tolist(), logprobs, why))
    return results
