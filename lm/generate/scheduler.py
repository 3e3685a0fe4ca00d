"""Continuous batching: which tokens of which sequences the next step computes.

A step has room for a number of tokens. Sequences that are generating take one each; what is left
goes to prompts, in pieces (chunked prefill), in the order of arrival. When pages run out, the
sequence that began last gives up its pages and is computed again later (preemption).
"""

import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import Any

from lm.generate.pages import Pool, digests

Reach = tuple[int, int] | None  # (window, sink tokens) of layers; None: all positions


@dataclasses.dataclass(eq=False)
class Job:
    """A sequence that is generated.

    request    what was asked for
    tokens     prompt and what was generated
    prompt     length of the prompt
    computed   tokens whose keys and values are in the cache
    cached     of these, the first ones that another sequence had computed (prefix caching)
    pages      of each reach, one per `size` tokens; None for pages that are no longer seen
    digests    of full pages
    known      full pages that other jobs can find
    draft      tokens that may follow (speculative decoding)
    guide      what the continuation must be like, as far as it is written
    """

    request: Any
    tokens: list[int]
    prompt: int
    may_reuse: bool = True
    computed: int = 0
    cached: int = 0
    pages: dict[Reach, list[int | None]] = dataclasses.field(default_factory=dict)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    known: int = 0
    draft: list[int] = dataclasses.field(default_factory=list)
    guide: Any = None
    paused: bool = False
    result: Any = None

    @property
    def waiting_tokens(self) -> int:
        """Tokens that have not been computed."""
        return len(self.tokens) - self.computed


class Scheduler:
    """Plans steps over `pools`, one per reach, of pages with `size` tokens: of at most `most` jobs,
    with at most `chunk` tokens of each. Pages of a window are kept for `slack` tokens more.

    waiting, running   jobs in the order of arrival
    preempted          how often a job gave up its pages
    """

    def __init__(
        self,
        pools: Mapping[Reach, Pool],
        *,
        size: int,
        most: int,
        chunk: int,
        prefix_caching: bool = True,
        slack: int = 0,
    ):
        self.pools, self.size, self.most = dict(pools), size, most
        self.chunk, self.prefix_caching, self.slack = chunk, prefix_caching, slack
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.preempted = 0

    def add(self, job: Job) -> None:
        """Queues a job."""
        self.waiting.append(job)

    def plan(self, room: int) -> dict[Job, int]:
        """{job: number of its next tokens} for a step of at most `room` tokens, with pages."""
        planned: dict[Job, int] = {}
        preempted = self.preempted
        # A stable sort: jobs that generate come before those whose prompt is being read.
        for job in sorted(self.running, key=lambda job: job.waiting_tokens > 1):
            if job.paused:
                continue
            count = min(job.waiting_tokens, self.chunk, room - sum(planned.values()))
            if count and job in self.running and self._make_room(job, count, planned):
                planned[job] = count
        room -= sum(planned.values())
        # After a preemption the job that lost its pages would only take them back.
        while self.waiting and room and len(self.running) < self.most:
            first = self.waiting[0]
            if self.preempted > preempted or self._is_being_computed(first):
                break
            if not self._admit(first, room):
                break
            job = self.waiting.popleft()
            self.running.append(job)
            planned[job] = min(job.waiting_tokens, self.chunk, room)
            self._grow(job, planned[job])
            room -= planned[job]
        for job in planned:
            room -= self._add_draft(job, planned, room)
        return planned

    def _add_draft(self, job: Job, planned: dict[Job, int], room: int) -> int:
        """Adds the draft of a job to the plan as far as there are room and pages; returns how many
        tokens."""
        count, most = planned[job], 0
        if count == job.waiting_tokens:
            most = min(len(job.draft), self.chunk - count, room)
        while most and any(
            self._needed(job, reach, count + most) > pool.available
            for reach, pool in self.pools.items()
        ):
            most -= 1
        job.draft = job.draft[:most]
        planned[job] += most
        self._grow(job, planned[job])
        return most

    def computed(self, job: Job, count: int) -> None:
        """Records that a step has computed the next `count` tokens of a job."""
        job.computed += count
        full = job.computed // self.size
        if self.prefix_caching and full > job.known:
            if full > len(job.digests):
                job.digests = digests(job.tokens[: job.computed], self.size, job.digests)
            self._keep(job, job.known, full)
            job.known = full
        for reach in job.pages:
            self._drop_hidden(job, reach)

    def _keep(self, job: Job, start: int, stop: int) -> None:
        """Makes pages start .. stop - 1 known."""
        for reach, pages in job.pages.items():
            for i in range(start, stop):
                if pages[i] is not None:
                    self.pools[reach].keep(pages[i], job.digests[i])

    def remove(self, job: Job) -> None:
        """Ends a job; its pages become free."""
        if job in self.running:
            self.running.remove(job)
            self._drop_all(job)
        elif job in self.waiting:
            self.waiting.remove(job)

    def _hidden(self, reach: Reach, position: int) -> range:
        """The pages that a token at `position` does not see any more."""
        if reach is None:
            return range(0)
        window, sinks = reach
        first = max(0, position - self.slack - window + 1)
        return range(-(-sinks // self.size), first // self.size)

    def _needed(self, job: Job, reach: Reach, count: int) -> int:
        """Pages that a job lacks for its next `count` tokens."""
        return -(-(job.computed + count) // self.size) - len(job.pages.get(reach, ()))

    def _make_room(self, job: Job, count: int, planned: dict[Job, int]) -> bool:
        """Finds pages, by preemption if needed; False if the job itself was preempted."""
        while any(
            self._needed(job, reach, count) > pool.available for reach, pool in self.pools.items()
        ):
            last = self.running[-1]
            planned.pop(last, None)
            self._preempt(last)
            if last is job:
                return False
        self._grow(job, count)
        return True

    def _preempt(self, job: Job) -> None:
        self.running.remove(job)
        self._drop_all(job)
        job.computed = 0
        self.waiting.appendleft(job)
        self.preempted += 1

    def _admit(self, job: Job, room: int) -> bool:
        """Takes over the cached pages of its prefix; False if there is no room for the rest."""
        hits = self._cached_pages(job) if self.prefix_caching and job.may_reuse else 0
        job.computed, job.cached, job.known = hits * self.size, hits * self.size, hits
        fits = True
        for reach, pool in self.pools.items():
            hidden = self._hidden(reach, job.computed)
            job.pages[reach] = [
                None if i in hidden else pool.find(job.digests[i]) for i in range(hits)
            ]
            for page in job.pages[reach]:
                if page is not None:
                    pool.share(page)
            # In layers with a window, early pages become free while later ones are computed.
            first = job.waiting_tokens
            if reach is not None:
                first = min(first, max(room, sum(reach) + 2 * self.size))
            fits &= self._needed(job, reach, first) <= pool.available
        if not fits:
            self._drop_all(job)
            job.computed = 0
        return fits

    def _is_being_computed(self, job: Job) -> bool:
        """Whether another job is computing the next page of its prefix, which it then can reuse."""
        if not (self.prefix_caching and job.may_reuse):
            return False
        hits = self._cached_pages(job)
        following = job.digests[hits : (len(job.tokens) - 1) // self.size][:1]
        return any(
            digest in other.digests[other.known :]
            for digest in following
            for other in self.running
            if other.waiting_tokens > 1
        )

    def _cached_pages(self, job: Job) -> int:
        """Number of pages of its prefix that the pools hold; the last token is not in them, since
        its logits are needed."""
        job.digests = digests(job.tokens, self.size, [])
        most = (len(job.tokens) - 1) // self.size
        if None in self.pools:
            found = self.pools[None].find
            most = next((i for i in range(most) if found(job.digests[i]) is None), most)
        for hits in range(most, 0, -1):
            if all(
                pool.find(job.digests[i]) is not None
                for reach, pool in self.pools.items()
                if reach is not None
                for i in range(hits)
                if i not in self._hidden(reach, hits * self.size)
            ):
                return hits
        return 0

    def _grow(self, job: Job, count: int) -> None:
        for reach, pool in self.pools.items():
            missing = self._needed(job, reach, count)
            job.pages.setdefault(reach, []).extend(pool.take() for _ in range(missing))

    def _drop_hidden(self, job: Job, reach: Reach) -> None:
        pages = job.pages[reach]
        for i in reversed(self._hidden(reach, job.computed)):
            if pages[i] is None:  # so are those before it
                break
            self.pools[reach].drop(pages[i])
            pages[i] = None

    def _drop_all(self, job: Job) -> None:
        for reach, pages in job.pages.items():
            # The last pages are forgotten first, so that shorter prefixes stay longer.
            for page in reversed(pages):
                if page is not None:
                    self.pools[reach].drop(page)
        job.pages = {}
