"""The generation engine: continuous batching over a paged KV cache.

    engine = Engine(model, context=2048)
    results = engine.generate([Request(prompt=ids, max_tokens=64), ...])

or, as a server does, `add` requests at any time and call `step` until `idle`. It takes and returns
token ids.

A compiled program computes a fixed number of rows. A row is one token of one sequence, of a prompt
or of a continuation, so that the same programs serve prefill and decoding. What a row computes does
not depend on the other rows: the tokens of a request are the same alone and among others, with
prompts cut anywhere, with and without a cached prefix, and after preemption. That holds bit for
bit if programs of all sizes add in the same order; the engine compares them when it starts, and in
float32 uses only those that do (`exact`).
"""

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lm import trees
from lm.errors import UserError, check_name, check_size
from lm.generate import decode, programs
from lm.generate.pages import Pool, needed
from lm.generate.request import Output, Request
from lm.generate.rows import Row, draw, make_batch, warm_up
from lm.generate.scheduler import Job, Scheduler
from lm.generate.speculative import Speculation
from lm.model import Model, reaches, unstacked
from lm.parallel import sharding

_DEFAULT_CACHE = 2**30  # bytes
_LEAST_ROOM = 64  # tokens of a step, so that 64 requests can generate at the same time
_MOST_ENTRIES = 2**17  # of the table of pages, which a TPU's scalar memory holds
DTYPES = ("float32", "bfloat16", "float16", "int8")


class Engine:
    """Generates for many requests at once.

    Args:
      model: with weights in the dtype of arithmetic (see `Model.cast`).
      context: most tokens of a prompt and its continuation.
      rows: sizes of the programs, in tokens; on a mesh, multiples of the shards of the batch.
        Default: 2, 8 and 32 in float32 if exact, 1, 8 and 64 if not; else 8, 64 and 256.
      cache_tokens: tokens that the pages hold. Default: as many as fit in 1 GiB on each device, but
        at least one context, and at most 64.
      cache_dtype: "float32", "bfloat16" or "int8"; default: that of the weights.
      page: tokens of a page. Default: 32; 128 on TPU and of int8; more for a
        context of over 16,384.
      chunk: most tokens of one prompt in a step. Default: as many as there is room for.
      prefix_caching: reuse the pages of prompts that begin alike.
      speculation: proposes tokens that a step checks all at once; outputs do not depend on it.
      exact: use only sizes whose results are equal bit for bit. Default: if the weights are
        float32.

    `exact` then says whether results depend on nothing but their request, bit for bit, as far as a
    trial at the start can tell: whether they depend on the size of a program, or on the order of
    its rows.
    `computed` counts the tokens computed so far, `drafted` those that were proposed, and `accepted`
    those of them that were right.
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
        speculation: Speculation | None = None,
        exact: bool | None = None,
    ):
        weights = jax.tree.leaves(model.params, is_leaf=trees.is_leaf)[0].dtype
        dtype = cache_dtype or str(weights)
        check_name("cache_dtype", dtype, DTYPES)
        ways = 1 if model.mesh is None else sharding.batch_ways(model.mesh)
        is_float32 = weights == jnp.float32
        exact = is_float32 if exact is None else exact
        if rows is None:
            rows = ((2, 8, 32) if exact else (1, 8, 64)) if is_float32 else (8, 64, 256)
        if page is None:
            page = 128 if dtype == "int8" or jax.default_backend() == "tpu" else 32
            while max(rows) * -(-context // page) > _MOST_ENTRIES:
                page *= 2
        most_of_one = max(_LEAST_ROOM, *rows) if chunk is None else chunk
        check_size(context=context, page=page, chunk=most_of_one)
        for size in rows:
            check_size(rows=size)
        tokens = cache_tokens
        if tokens is None:
            fitting = _DEFAULT_CACHE // programs.bytes_per_token(model, page, dtype)
            tokens = max(context, min(64 * context, fitting))
        check_size(cache_tokens=tokens)
        if tokens < context:
            raise UserError(
                f"cache_tokens={tokens} is less than context={context}; one sequence must fit."
            )
        self.model, self.context, self.page = unstacked(model), context, page
        self.cache_tokens = tokens
        self.rows = tuple(sorted({-(-size // ways) * ways for size in rows}))
        self._width = -(-context // page)
        self._reaches = reaches(model.config)
        # Tokens of a step, in several programs if need be.
        self._room = max(_LEAST_ROOM, self.rows[-1])
        sizes = {"page": page, "context": context, "rows": self._room}
        pools = {reach: Pool(needed(reach, tokens, **sizes)) for reach in self._reaches}
        self.scheduler = Scheduler(
            pools,
            size=page,
            most=self._room,
            chunk=most_of_one,
            prefix_caching=prefix_caching,
        )
        self.computed = self.drafted = self.accepted = 0
        counts = tuple((reach, pool.count) for reach, pool in pools.items())
        self._cache = programs.empty(self.model, counts, page, dtype)
        self._seconds = self._try(exact)
        self.rows = tuple(sorted(self._seconds))
        self.speculation = speculation
        if speculation is not None:
            speculation.begin(self)

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
        first = [None] if request.prompt_logprobs else []
        job.result = Output(prompt_logprobs=first, prompt_top=first[: request.logprobs])
        job.guide = None if request.guide is None else request.guide.start()
        self.scheduler.add(job)
        return job

    def cancel(self, job: Job, why: str = "ended") -> None:
        """Ends a request; its pages become free."""
        if job.result.finished is None:
            job.result.finished = why
            self.scheduler.remove(job)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache, on all devices together."""
        return sum(x.nbytes for x in jax.tree.leaves(self._cache))

    @property
    def idle(self) -> bool:
        """Whether no request is unfinished."""
        return not (self.scheduler.running or self.scheduler.waiting)

    def generate(self, requests: Iterable[Request]) -> list[Output]:
        """The outputs of requests, in their order. Raises UserError as `follow` does."""
        outputs = {number: job.result for number, job in self.follow(requests)}
        return [outputs[number] for number in sorted(outputs)]

    def follow(self, requests: Iterable[Request]) -> Iterator[tuple[int, Job]]:
        """Adds requests and computes until they have finished. Yields (number of the request, its
        job) for each step that gave it a token or ended it. If it is closed before the end, or a
        request is refused, all of them are cancelled.

        Raises UserError for a bad request, and at the end for an output with an error.
        """
        jobs: dict[Job, int] = {}
        try:
            for number, request in enumerate(requests):
                jobs[self.add(request)] = number
            while not all(job.result.finished for job in jobs):
                yield from ((jobs[job], job) for job in self.step() if job in jobs)
        finally:
            for job in jobs:
                self.cancel(job)
        for job in jobs:
            if job.result.error:
                raise UserError(job.result.error)

    # Steps

    def step(self) -> list[Job]:
        """Computes the next tokens; returns the jobs that have a new one, or have finished."""
        if self.speculation is not None:
            self._propose()
        planned = self.scheduler.plan(self._room)
        rows = [
            Row(job, place)
            for job, count in planned.items()
            for place in range(job.computed, job.computed + count)
        ]
        if not rows:
            return []
        size = min(self._seconds, key=lambda size: self._seconds[size] * -(-len(rows) // size))
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        drawn = jax.device_get([self._run(part, size) for part in parts])
        self.computed += len(rows)
        found = (
            (of_part, number)
            for part, of_part in zip(parts, drawn, strict=True)
            for number in range(len(part))
        )
        return [
            job
            for job, count in planned.items()
            if self._record(job, list(itertools.islice(found, count)))
        ]

    def _propose(self) -> None:
        """Lets the speculation propose drafts if there is room for those of all jobs."""
        running, drafts = self.scheduler.running, {}
        if len(running) * (1 + self.speculation.tokens) <= self.rows[-1]:
            generating = [job for job in running if job.waiting_tokens == 1]
            drafts = self.speculation.propose(generating)
        for job in running:
            left = job.request.max_tokens - len(job.result.tokens)
            most = max(0, min(left, self.context - len(job.tokens)) - 1)
            job.draft = drafts.get(job, [])[:most]
            if job.guide is not None:
                job.draft = job.draft[: job.guide.valid(job.draft)]

    def _run(self, part: list[Row], size: int) -> programs.Drawn:
        """Computes rows, and draws a token after each of those that end a sequence."""
        batch = make_batch(part, size, self._reaches, self._width)
        logits_rv, self._cache = programs.forward(self.model, self._cache, batch)
        return draw(logits_rv, part, batch.ints[:, 3])

    def _record(self, job: Job, found: list[tuple[programs.Drawn, int]]) -> bool:
        """Records what a step found for the next tokens of a job, (what was drawn, row in it) for
        each; returns whether the job has changed.

        A token of the draft is accepted if it is the token that was drawn in its place. So drafts
        change neither the tokens nor their distribution.
        """
        known, draft, length = job.result.prompt_logprobs, job.draft, len(job.tokens)
        finished, accepted = None, 0
        for place, (drawn, number) in enumerate(found, job.computed):
            drafted = place - length
            if drafted >= 0 and (finished or job.tokens[place] != draft[drafted]):
                break
            accepted += 1
            if len(known) == place + 1 < job.prompt:
                known.append(float(drawn.following[number]))
                if job.request.logprobs:
                    job.result.prompt_top.append(_top(job, drawn, number))
            if drafted >= -1:
                finished = self._append(job, number, drawn)
        self.drafted += len(draft)
        self.accepted += max(0, job.computed + accepted - length)
        job.draft = []
        self.scheduler.computed(job, accepted)
        if finished:
            self.cancel(job, finished)
        return len(job.tokens) > length or finished is not None

    def _append(self, job: Job, number: int, drawn: programs.Drawn) -> str | None:
        """Appends a drawn token; returns why the job ends, if it does."""
        request, output = job.request, job.result
        token, logprob = int(drawn.tokens[number]), float(drawn.logprobs[number])
        if math.isnan(logprob):
            output.error = (
                "The model's logits are not finite: weights are not finite, or arithmetic "
                "overflows. Try float32 (--compute float32) or an earlier checkpoint (--step)."
            )
            return "error"
        if not output.tokens:
            output.cached = job.cached
        output.tokens.append(token)
        output.logprobs.append(logprob)
        if request.logprobs:
            output.top.append(_top(job, drawn, number))
        job.tokens.append(token)
        if job.guide is not None and job.guide.advance(token):
            output.error = job.guide.error
            return "error" if output.error else "stop"
        if token in request.stop_tokens:
            return "stop"
        if len(output.tokens) >= request.max_tokens:
            return "max_tokens"
        return "context" if len(job.tokens) >= self.context else None

    # Programs

    def warm_up(self) -> None:
        """Compiles the programs that draw tokens, for all options of requests, so that nothing is
        compiled later. The others are compiled from the start."""
        for size in self.rows:
            batch = make_batch([], size, self._reaches, self._width)
            logits_rv, self._cache = programs.forward(self.model, self._cache, batch)
            warm_up(logits_rv)
        if self.speculation is not None:
            self.speculation.warm_up()

    def _try(self, exact: bool) -> dict[int, float]:
        """Compiles the programs and computes a short text with each. Returns the seconds of a call
        of each size that is used: if `exact`, of the most sizes that agree bit for bit."""
        tokens = np.random.default_rng(0).integers(0, self.model.config.vocab, self.rows[-1])
        pages = {reach: list(range(self._width)) for reach in self._reaches}
        job = Job(None, tokens.tolist()[: self.context], 0, pages=pages)
        rows = [Row(job, place) for place in range(len(job.tokens))]
        found = {size: self._time(rows[: max(size, 4)], size) for size in reversed(self.rows)}
        sets: list[dict[int, float]] = []
        for size, (logits, seconds) in found.items():
            for each in sets:
                other, _ = found[next(iter(each))]
                if np.array_equal(logits, other[: len(logits)]):
                    each[size] = seconds
                    break
            else:
                sets.append({size: seconds})

        # Not the fastest set: that would depend on what else runs on the machine.
        most = max(sets, key=lambda each: (len(each), max(each)))
        best = most if exact else {size: seconds for size, (_, seconds) in found.items()}
        largest = max(best)
        backwards, _ = self._time(rows[:largest][::-1], largest)
        is_free = np.array_equal(backwards[::-1], found[largest][0][:largest])
        self.exact = is_free and len(best) == len(most)
        return self._agreed(best)

    def _agreed(self, seconds: dict[int, float]) -> dict[int, float]:
        """On several hosts, the first one's: all must run the same programs."""
        if jax.process_count() == 1:
            return seconds
        table = np.array([seconds.get(size, math.inf) for size in self.rows])
        table = multihost_utils.broadcast_one_to_all(table)
        return {size: float(x) for size, x in zip(self.rows, table) if x < math.inf}

    def _time(self, rows: list[Row], size: int) -> tuple[np.ndarray, float]:
        """(logits of the rows, seconds of a call of this size)."""
        logits, seconds = [], math.inf
        for i in range(0, len(rows), size):
            part = rows[i : i + size]
            batch = make_batch(part, size, self._reaches, self._width)
            for _ in range(3):  # the first call compiles
                start = time.perf_counter()
                logits_rv, self._cache = programs.forward(self.model, self._cache, batch)
                computed = np.asarray(logits_rv)[: len(part)]
                seconds = min(seconds, time.perf_counter() - start)
            logits.append(computed)
        return np.concatenate(logits), seconds


def _top(job: Job, drawn: programs.Drawn, number: int) -> list[tuple[int, float]]:
    """The most probable tokens of a row, as many as the request asks for."""
    best = zip(drawn.top_tokens[number], drawn.top_logprobs[number])
    return [(int(token), float(logprob)) for token, logprob in best][: job.request.logprobs]
