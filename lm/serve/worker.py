"""The thread that owns the engines. An engine is not thread-safe: handlers put calls into the
worker's inbox, and the worker puts new tokens into the queues of the calls."""

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lm.errors import UserError
from lm.generate import Request
from lm.generate.scheduler import Job
from lm.serve.errors import ApiError, internal, unavailable
from lm.serve.variants import Variant


class Update(NamedTuple):
    """What is new of a sequence: as in lm.generate.request.Output, since the last update."""

    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    top: Sequence[list[tuple[int, float]]] = ()
    finished: str | None = None
    prompt_logprobs: Sequence[float | None] = ()
    prompt_top: Sequence[Any] = ()
    cached: int = 0
    error: ApiError | None = None


class Continuation:
    """A sequence of a call, on the worker's side.

    began, ended   when its first and its last token came, by time.perf_counter
    """

    def __init__(self, call: "Call", index: int, request: Request):
        self.call, self.index, self.request = call, index, request
        self.job: Job | None = None
        self.sent = 0  # tokens
        self.began: float | None = None
        self.ended: float | None = None
        self.done = False

    def update(self) -> Update:
        """What is new since the last call."""
        result, start = self.job.result, self.sent
        self.sent = len(result.tokens)
        first = not start
        error = None
        if result.finished == "error":
            error = internal(result.error)
        return Update(
            result.tokens[start:],
            result.logprobs[start:],
            result.top[start:],
            result.finished,
            result.prompt_logprobs if first else [],
            result.prompt_top if first else [],
            result.cached,
            error,
        )


class Call:
    """The sequences of one request of a client.

    incremental   whether all tokens are wanted as they come, or only together at the end
    queue         of (index of the sequence, Update)
    """

    def __init__(self, variant: Variant, requests: Sequence[Request], incremental: bool):
        self.variant, self.incremental = variant, incremental
        self.continuations = [Continuation(self, i, request) for i, request in enumerate(requests)]
        self.queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self.submitted = time.perf_counter()


class Stats(NamedTuple):
    """Of a variant: sequences running and waiting, pages in use and in all, preemptions."""

    running: int = 0
    waiting: int = 0
    used: int = 0
    pages: int = 0
    preempted: int = 0


class Worker(threading.Thread):
    """Loads the variants, then computes until `close`.

    variants   by name, once `ready`
    failed     the error that ended it
    stats      of each variant
    """

    def __init__(self, load: Callable[[], list[Variant]], *, notify: Callable[[], None]):
        super().__init__(name="engine", daemon=True)
        self._load, self._notify = load, notify
        self._inbox: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]]
        self._inbox = queue.SimpleQueue()
        self._outbox: list[tuple[Continuation, Update]] = []
        self._sequences: dict[Job, Continuation] = {}
        self._submitted = self._begun = 0  # of two threads; each writes one
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self.variants: dict[str, Variant] = {}
        self.stats: dict[str, Stats] = {}
        self.ready, self.failed = False, None

    # Of any thread

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread; `loop` is where the handlers run."""
        self._loop = loop
        self.start()

    @property
    def waiting(self) -> int:
        """Sequences without their first token."""
        return self._submitted - self._begun

    def submit(self, call: Call) -> None:
        """Begins a call."""
        self._submitted += len(call.continuations)
        self._inbox.put((self._add, (call,)))

    def cancel(self, sequences: Sequence[Continuation]) -> None:
        """Ends sequences; their pages become free."""
        self._inbox.put((self._cancel, (sequences,)))

    def fail_all(self, error: ApiError) -> None:
        """Ends all sequences with an error."""
        self._inbox.put((self._fail, (error, None)))

    def close(self) -> None:
        """Ends the thread after the present step."""
        self._inbox.put((self._close, ()))

    # Of the worker's thread

    def run(self) -> None:
        """Loads, then computes."""
        try:
            for variant in self._load():
                self.variants[variant.name] = variant
            self._record_stats()
            self.ready = True
            self._post(self._notify)
            while not self._closing:
                self._receive()
                for variant in self.variants.values():
                    if not variant.engine.idle:
                        self._step(variant)
                self._record_stats()
                self._deliver()
        except BaseException as error:
            self.failed = error
        self.ready = False
        self._fail(unavailable("The server has stopped."), None)
        self._deliver()
        self._post(self._notify)

    def _receive(self) -> None:
        """Does what is in the inbox; waits for something if there is nothing to compute."""
        idle = all(variant.engine.idle for variant in self.variants.values())
        while True:
            try:
                function, arguments = self._inbox.get(block=idle)
            except queue.Empty:
                return
            function(*arguments)
            idle = False

    def _close(self) -> None:
        self._closing = True

    def _add(self, call: Call) -> None:
        for sequence in call.continuations:
            try:
                sequence.job = call.variant.engine.add(sequence.request)
                self._sequences[sequence.job] = sequence
            except UserError as error:
                self._end(sequence, Update(error=ApiError(400, str(error))))
            except Exception:
                traceback.print_exc()
                self._end(sequence, Update(error=internal()))

    def _cancel(self, sequences: Sequence[Continuation]) -> None:
        for sequence in sequences:
            if not sequence.done:
                self._sequences.pop(sequence.job, None)
                sequence.call.variant.engine.cancel(sequence.job)
                self._end(sequence, None)

    def _fail(self, error: ApiError, variant: Variant | None) -> None:
        """Ends all sequences, or those of a variant."""
        for job, sequence in list(self._sequences.items()):
            if variant in (None, sequence.call.variant):
                del self._sequences[job]
                if variant is None and not self.failed:
                    sequence.call.variant.engine.cancel(job)
                self._end(sequence, Update(error=error))

    def _end(self, sequence: Continuation, update: Update | None) -> None:
        if sequence.began is None:
            self._begun += 1
        sequence.done = True
        if update is not None:
            self._outbox.append((sequence, update))

    def _step(self, variant: Variant) -> None:
        try:
            changed = variant.engine.step()
        except Exception:
            # Any of the sequences may be the reason, and the cache may be lost.
            traceback.print_exc()
            self._fail(internal(), variant)
            self._deliver()
            variant.build()
            return
        now = time.perf_counter()
        for job in changed:
            if (sequence := self._sequences.get(job)) is None:
                continue
            if sequence.began is None:
                sequence.began = now
                self._begun += 1
            sequence.ended = now
            if job.result.finished:
                del self._sequences[job]
                self._end(sequence, sequence.update())
            elif sequence.call.incremental:
                self._outbox.append((sequence, sequence.update()))

    def _record_stats(self) -> None:
        for name, variant in self.variants.items():
            scheduler = variant.engine.scheduler
            pools = scheduler.pools.values()
            self.stats[name] = Stats(
                len(scheduler.running),
                len(scheduler.waiting),
                sum(pool.used for pool in pools),
                sum(pool.count for pool in pools),
                scheduler.preempted,
            )

    def _deliver(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._post(_put_all, outbox)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed
            self._closing = True


def _put_all(updates: list[tuple[Continuation, Update]]) -> None:
    for sequence, update in updates:
        sequence.call.queue.put_nowait((sequence.index, update))
