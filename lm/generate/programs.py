"""The compiled programs of the generation engine: R tokens through the model, each with the pages
of its sequence, and a draw from each row of logits."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.generate.sampling import sample
from lm.model import Model, Paged, init_pages, reaches
from lm.parallel import sharding


class Batch(NamedTuple):
    """ints [R, 4]: token, position, whether the row is used, the following token of the prompt;
    tables [reaches, R, pages]."""

    ints: np.ndarray
    tables: np.ndarray


class Form(NamedTuple):
    """What a program can draw: at random, with filters, with adjusted logits; and how many of the
    most probable tokens it reports."""

    random: bool
    filtered: bool
    adjusted: bool
    top: int


class Adjustments(NamedTuple):
    """bias [R, V] is added to logits; seen [R, V] are the tokens that occurred."""

    bias_rv: np.ndarray
    seen_rv: np.ndarray


class Drawn(NamedTuple):
    """Of each row: the token drawn, its log-probability, that of the following token, and the most
    probable tokens."""

    tokens: jax.Array
    logprobs: jax.Array
    following: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


@partial(jax.jit, static_argnames=("counts", "page", "dtype"))
def empty(model: Model, counts: tuple[tuple[Any, int], ...], page: int, dtype: str) -> Any:
    """Caches with the given numbers of pages of each reach."""
    ways = 1 if model.mesh is None else model.mesh.shape["tensor"]
    with model.on_mesh(sharding.UNSPLIT_SEQUENCE):
        caches = init_pages(model.config, dict(counts), page, jnp.dtype(dtype), ways)
        return _map(_constrained, caches)


def bytes_per_token(model: Model, page: int, dtype: str) -> int:
    """Bytes of the cache per token on each device."""
    counts = tuple((reach, 1) for reach in reaches(model.config))
    caches = jax.tree.leaves(jax.eval_shape(lambda: empty(model, counts, page, dtype)))
    ways = 1 if model.mesh is None else model.mesh.shape["tensor"]
    return max(1, sum(x.size * x.dtype.itemsize for x in caches) // (page * ways))


def _constrained(cache: Paged) -> Paged:
    """Every device holds its heads of all pages."""
    lead = ("norm",) * (cache.k.ndim - 3)
    k, v = (sharding.shard(x, *lead, "kv_heads", "norm", "head") for x in (cache.k, cache.v))
    scales = tuple(sharding.shard(x, *lead, "kv_heads", "norm") for x in cache.scales)
    return dataclasses.replace(cache, k=k, v=v, scales=scales)


def _map(function: Any, caches: Any) -> Any:
    return jax.tree.map(function, caches, is_leaf=lambda x: isinstance(x, Paged))


@partial(jax.jit, donate_argnames="caches")
def forward(model: Model, caches: Any, batch: Batch) -> tuple[jax.Array, Any]:
    """(logits [R, V] after each row's token, caches with the rows' keys and values)."""
    tables = dict(zip(reaches(model.config), batch.tables, strict=True))
    token_r, position_r, used_r, _ = batch.ints.T
    with model.on_mesh(sharding.UNSPLIT_SEQUENCE):
        placed = _map(lambda x: dataclasses.replace(x, table_bp=tables[x.reach]), caches)
        output = model(
            sharding.shard(token_r[:, None], "batch", "seq"),
            positions_bt=position_r[:, None],
            mask_bt=used_r[:, None] == 1,
            cache=placed,
        )
        logits_rv = model.logits(output.hidden_btd)[:, 0]
        caches = _map(lambda x: _constrained(dataclasses.replace(x, table_bp=None)), output.cache)
    if model.mesh is not None:
        logits_rv = jax.lax.with_sharding_constraint(logits_rv, sharding.replicated(model.mesh))
    return logits_rv, caches


class Draw(NamedTuple):
    """What a draw reads: ints [R, 4] are seed, index, step and top-k; floats [R, 4] temperature,
    top-p, min-p and the repetition penalty; following [R] the next token of the prompt."""

    logits_rv: jax.Array
    following_r: np.ndarray
    ints_r4: np.ndarray
    floats_r4: np.ndarray
    adjustments: Adjustments | None


@partial(jax.jit, static_argnames="form")
def draw(of: Draw, *, form: Form) -> Drawn:
    """Draws a token from each row. What a row does not need has values that change nothing."""

    def one_by_one(of: Draw) -> Drawn:
        """The order in which a CPU adds over the vocabulary depends on the number of rows."""

        def one(row: Draw) -> Drawn:
            drawn = _draw(jax.tree.map(lambda x: x[None], row), form)
            return jax.tree.map(lambda x: x[0], drawn)

        return jax.lax.map(one, of)

    return jax.lax.platform_dependent(of, cpu=one_by_one, default=partial(_draw, form=form))


def _draw(of: Draw, form: Form) -> Drawn:
    seed_r, index_r, step_r, _ = of.ints_r4.T
    temperature, top_p, min_p, penalty = (x[:, None] for x in of.floats_r4.T)
    active = {}
    if form.filtered:
        active = {"top_k": of.ints_r4[:, 3:], "top_p": top_p, "min_p": min_p}
    candidates_rv, seen_rv = of.logits_rv, None
    if of.adjustments is not None:
        active["repetition_penalty"] = penalty
        seen_rv, candidates_rv = of.adjustments.seen_rv, of.logits_rv + of.adjustments.bias_rv
    greedy_r = temperature[:, 0] == 0
    if form.random:
        active["temperature"] = jnp.where(greedy_r[:, None], 1, temperature)

    def key(seed: jax.Array, index: jax.Array, step: jax.Array) -> jax.Array:
        seed = jax.lax.bitcast_convert_type(seed, jnp.uint32)
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), step)

    keys_r = jax.vmap(key)(seed_r, index_r, step_r) if form.random else None
    token_r = sample(candidates_rv, active, keys_r, seen_rv)
    if form.random:
        # The most probable token, after the penalty, passes all filters.
        only = {name: x for name, x in active.items() if name == "repetition_penalty"}
        token_r = jnp.where(greedy_r, sample(candidates_rv, only, keys_r, seen_rv), token_r)
    logprob_rv = jax.nn.log_softmax(of.logits_rv, axis=-1)

    def at(token_r: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logprob_rv, token_r[:, None], axis=-1)[:, 0]

    top_logprobs, top_tokens = jax.lax.top_k(logprob_rv, min(form.top, logprob_rv.shape[-1]))
    return Drawn(token_r, at(token_r), at(of.following_r), top_tokens, top_logprobs)
