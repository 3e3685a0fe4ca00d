"""The generation engine: continuous batching over a paged KV cache.

    engine = Engine(model, context=2048)
    results = engine.generate([Request(prompt=ids, max_tokens=64), ...])

or, as a server does, `add` requests at any time and call `step` until `idle`. It takes and returns
token ids.

A compiled program computes a fixed number of rows. A row is one token of one sequence, of a prompt
or of a continuation, so that the same programs serve prefill and decoding. What a row computes does
not depend on the other rows: the tokens of a request are the same alone and among others, with
prompts cut anywhere, with and without a cached prefix, and after preemption. That holds bit for
bit if programs of all sizes add in the same order; the engine tries them, and by default uses only
those that do (`exact`).
"""

import math
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import trees
from lm.errors import UserError, check_name, check_size
from lm.generate import decode, programs
from lm.generate.pages import Pool
from lm.generate.request import MOST_LOGPROBS, Output, Request
from lm.generate.scheduler import Job, Scheduler
from lm.model import Model, reaches, unstacked
from lm.parallel import sharding

DTYPES = ("float32", "bfloat16", "float16", "int8")


class Engine:
    """Generates for many requests at once.

    Args:
      model: with weights in the dtype of arithmetic (see `Model.cast`).
      context: most tokens of a prompt and its continuation.
      rows: sizes of the programs, in tokens; on a mesh, multiples of the shards of the batch.
        Default: 1 and 64 in float32, else 8, 64 and 256.
      cache_tokens: tokens that the pages hold. Default: 8 contexts.
      cache_dtype: "float32", "bfloat16" or "int8"; default: that of the weights.
      page: tokens of a page. Default: 32, and 128 of int8.
      chunk: most tokens of one prompt in a step. Default: as many as there is room for.
      prefix_caching: reuse the pages of prompts that begin alike.
      exact: use only sizes whose results are equal bit for bit. Default: if the weights are
        float32.

    `exact` then says whether results depend on nothing but their request, bit for bit, as far as a
    try can tell: that they do not depend on the size of a program, nor on the order of its rows.
    """

    def __init__(
        self,
        model: Model,
        *,
        context: int,
        rows: Sequence[int] | None = None,
        cache_tokens: int | None = None,
        cache_dtype: str | None = None,
        page: int | None = None,
        chunk: int | None = None,
        prefix_caching: bool = True,
        exact: bool | None = None,
    ):
        weights = jax.tree.leaves(model.params, is_leaf=trees.is_leaf)[0].dtype
        dtype = cache_dtype or str(weights)
        check_name("cache_dtype", dtype, DTYPES)
        if page is None:
            page = 128 if dtype == "int8" else 32
        ways = 1 if model.mesh is None else sharding.batch_ways(model.mesh)
        if rows is None:
            rows = (1, 64) if weights == jnp.float32 else (8, 64, 256)
        tokens = 8 * context if cache_tokens is None else cache_tokens
        most_of_one = max(rows) if chunk is None else chunk
        check_size(context=context, page=page, chunk=most_of_one, cache_tokens=tokens)
        for size in rows:
            check_size(rows=size)
        if tokens < context:
            raise UserError(
                f"cache_tokens={tokens} is less than context={context}; one sequence must fit."
            )
        self.model, self.context, self._page = unstacked(model), context, page
        self.rows = tuple(sorted({-(-size // ways) * ways for size in rows}))
        self._width = -(-context // page)
        self._reaches = reaches(model.config)
        pools = {reach: Pool(self._pages(reach, tokens)) for reach in self._reaches}
        self.scheduler = Scheduler(
            pools,
            size=page,
            most=self.rows[-1],
            chunk=most_of_one,
            prefix_caching=prefix_caching,
        )
        counts = tuple((reach, pool.count) for reach, pool in pools.items())
        self._cache = programs.empty(self.model, counts, page, dtype)
        self._seconds = self._try(weights == jnp.float32 if exact is None else exact)
        self.rows = tuple(sorted(self._seconds))

    def _pages(self, reach: tuple[int, int] | None, tokens: int) -> int:
        """Pages of the layers with a reach."""
        all_tokens = -(-tokens // self._page)
        if reach is None:
            return all_tokens
        # Of each sequence: a window, the sinks, the tokens of a step, and the parts at both ends.
        seen = sum(-(-part // self._page) + 1 for part in (*reach, self.rows[-1]))
        sequences = max(1, tokens // self.context)
        return max(min(all_tokens, sequences * seen), seen, self._width)

    # Requests

    def add(self, request: Request) -> Job:
        """Queues a request; `job.result` is its Output. Raises UserError for a bad request."""
        decode.check_prompts(self.model.config, [request.prompt], self.context)
        vocab = self.model.config.vocab
        for name in ("logit_bias", "first_tokens"):
            for token in getattr(request, name) or ():
                if not 0 <= token < vocab:
                    raise UserError(
                        f"{name} has token {token}; the vocabulary ends at {vocab - 1}."
                    )
        prompt = [int(token) for token in request.prompt]
        # Log-probabilities of the prompt need a pass over all of it.
        job = Job(request, prompt, len(prompt), may_reuse=not request.prompt_logprobs)
        job.result = Output(prompt_logprobs=[None] if request.prompt_logprobs else [])
        self.scheduler.add(job)
        return job

    def cancel(self, job: Job, why: str = "ended") -> None:
        """Ends a request; its pages become free."""
        if job.result.finished is None:
            job.result.finished = why
            self.scheduler.remove(job)

    @property
    def idle(self) -> bool:
        """Whether no request is unfinished."""
        return not (self.scheduler.running or self.scheduler.waiting)

    def generate(self, requests: Iterable[Request]) -> list[Output]:
        """The outputs of requests, in their order. Raises UserError for a bad request, and for
        logits that are not finite."""
        jobs = [self.add(request) for request in requests]
        try:
            while not all(job.result.finished for job in jobs):
                self.step()
        finally:
            for job in jobs:
                self.cancel(job)
        if any(job.result.finished == "error" for job in jobs):
            raise UserError(
                "The model's logits are not finite: weights are not finite, or arithmetic "
                "overflows. Try float32 (--compute float32) or an earlier checkpoint (--step)."
            )
        return [job.result for job in jobs]

    # Steps

    def step(self) -> list[Job]:
        """Computes the next tokens; returns the jobs that have a new one, or have finished."""
        planned = self.scheduler.plan(self.rows[-1])
        rows = [
            _Row(job, place, place == len(job.tokens) - 1)
            for job, count in planned.items()
            for place in range(job.computed, job.computed + count)
        ]
        if not rows:
            return []
        size = min(self._seconds, key=lambda size: self._seconds[size] * -(-len(rows) // size))
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        drawn = jax.device_get([self._run(part, size) for part in parts])
        for job, count in planned.items():
            self.scheduler.computed(job, count)
        changed = []
        for part, of_part in zip(parts, drawn, strict=True):
            changed += self._record(part, of_part)
        return changed

    def _run(self, rows: list["_Row"], size: int) -> programs.Drawn:
        """Computes rows, and draws a token from each of those that end a sequence."""
        batch = self._batch(rows, size)
        logits_rv, self._cache = programs.forward(self.model, self._cache, batch)
        return self._draw(logits_rv, rows, batch.ints[:, 3])

    def _batch(self, rows: list["_Row"], size: int) -> programs.Batch:
        ints_r4 = np.zeros((size, 4), np.int32)
        tables = np.zeros((len(self._reaches), size, self._width), np.int32)
        for number, (job, place, _) in enumerate(rows):
            following = job.tokens[place + 1] if place + 1 < len(job.tokens) else 0
            ints_r4[number] = job.tokens[place], place, 1, following
            if number and rows[number - 1].job is job:
                tables[:, number] = tables[:, number - 1]
                continue
            for table, reach in zip(tables, self._reaches, strict=True):
                pages = job.pages[reach]
                table[number, : len(pages)] = [page or 0 for page in pages]
        return programs.Batch(ints_r4, tables)

    def _draw(
        self, logits_rv: jax.Array, rows: list["_Row"], following: np.ndarray
    ) -> programs.Drawn:
        size, most = len(following), np.iinfo(np.int32).max
        ints, floats = np.zeros((size, 4), np.int32), np.zeros((size, 4), np.float32)
        ints[:, 3] = most
        floats[:] = (0, np.inf, 0, 1)
        names, top = set(), 0
        for number, (job, _, draws) in enumerate(rows):
            if draws:
                request, own = job.request, job.request.sampling.filters()
                names |= set(own)
                top = max(top, request.logprobs)
                seed = np.uint32(request.seed).view(np.int32)
                step = len(job.result.tokens)
                ints[number] = seed, request.index, step, own.get("top_k", most)
                floats[number] = (
                    own.get("temperature", 0),
                    own.get("top_p", np.inf),
                    own.get("min_p", 0),
                    own.get("repetition_penalty", 1),
                )
        bias_rv, seen_rv = self._adjustments(rows, size, "repetition_penalty" in names)
        return programs.draw(
            *(logits_rv, following, ints, floats, bias_rv, seen_rv),
            random="temperature" in names,
            filters=tuple(sorted(names & {"top_k", "top_p", "min_p"})),
            top=MOST_LOGPROBS if top else 0,
        )

    def _adjustments(
        self, rows: list["_Row"], size: int, penalized: bool
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """What is added to logits, and the tokens that occurred, [R, V]."""
        vocab = self.model.config.vocab
        drawn = [(number, row.job) for number, row in enumerate(rows) if row.draws]
        bias_rv = seen_rv = None
        if any(job.request.adjusts for _, job in drawn):
            bias_rv = np.zeros((size, vocab), np.float32)
        if penalized:
            seen_rv = np.zeros((size, vocab), bool)
        for number, job in drawn:
            request, own = job.request, job.tokens[job.prompt :]
            if seen_rv is not None:
                seen_rv[number, job.tokens] = True
            if request.adjusts:
                tokens, counts = np.unique(np.array(own, np.int32), return_counts=True)
                bias_rv[number, tokens] -= (
                    request.presence_penalty + request.frequency_penalty * counts
                )
                for token, value in request.logit_bias.items():
                    bias_rv[number, token] += value
                if request.first_tokens is not None and not own:
                    others = np.ones(vocab, bool)
                    others[list(request.first_tokens)] = False
                    bias_rv[number, others] = -np.inf
        return bias_rv, seen_rv

    def _record(self, rows: list["_Row"], drawn: programs.Drawn) -> list[Job]:
        changed = []
        for number, (job, place, draws) in enumerate(rows):
            known = job.result.prompt_logprobs
            if len(known) == place + 1 < job.prompt:
                known.append(float(drawn.following[number]))
            if draws:
                self._append(job, number, drawn)
                changed.append(job)
        return changed

    def _append(self, job: Job, number: int, drawn: programs.Drawn) -> None:
        request, output = job.request, job.result
        token, logprob = int(drawn.tokens[number]), float(drawn.logprobs[number])
        if math.isnan(logprob):
            self.cancel(job, "error")
            return
        if not output.tokens:
            output.cached = job.cached
        output.tokens.append(token)
        output.logprobs.append(logprob)
        if request.logprobs:
            best = zip(drawn.top_tokens[number], drawn.top_logprobs[number])
            output.top.append([(int(i), float(p)) for i, p in best][: request.logprobs])
        job.tokens.append(token)
        if token in request.stop_tokens:
            self.cancel(job, "stop")
        elif len(output.tokens) >= request.max_tokens:
            self.cancel(job, "max_tokens")
        elif len(job.tokens) >= self.context:
            self.cancel(job, "context")

    # Programs

    def _try(self, exact: bool) -> dict[int, float]:
        """Compiles the programs and computes a short text with each. Returns the seconds of one
        call of each size; if `exact`, of those whose results equal the largest bit for bit."""
        tokens = np.random.default_rng(0).integers(0, self.model.config.vocab, self.rows[-1])
        pages = {reach: list(range(self._width)) for reach in self._reaches}
        job = Job(None, tokens.tolist()[: self.context], 0, pages=pages)
        rows = [_Row(job, place, False) for place in range(len(job.tokens))]
        want, _ = self._time(rows, self.rows[-1])
        backwards, seconds = self._time(rows[::-1], self.rows[-1])
        self.exact = np.array_equal(backwards[::-1], want)
        found = {self.rows[-1]: seconds}
        for size in self.rows[:-1]:
            logits, seconds = self._time(rows[: max(size, 4)], size)
            if not exact or np.array_equal(logits, want[: len(logits)]):
                found[size] = seconds
            self.exact &= np.array_equal(logits, want[: len(logits)]) or exact
        return found

    def _time(self, rows: list["_Row"], size: int) -> tuple[np.ndarray, float]:
        """(logits of the rows, seconds of a call of this size)."""
        logits, seconds = [], math.inf
        for i in range(0, len(rows), size):
            part = rows[i : i + size]
            batch = self._batch(part, size)
            for _ in range(3):  # the first call compiles
                start = time.perf_counter()
                logits_rv, self._cache = programs.forward(self.model, self._cache, batch)
                computed = np.asarray(logits_rv)[: len(part)]
                seconds = min(seconds, time.perf_counter() - start)
            logits.append(computed)
        return np.concatenate(logits), seconds


class _Row(NamedTuple):
    """A token to compute: the job, the place in its tokens, and whether the next token is drawn
    from it."""

    job: Job
    place: int
    draws: bool
