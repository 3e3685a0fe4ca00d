"""Speculative decoding (Leviathan et al., arXiv:2211.17192): a draft of the next tokens is proposed
cheaply, and one step of the engine checks all of it.

The engine draws the token of each place as it would without a draft, with the same random numbers,
and accepts the draft up to the first token that differs. So outputs are those of plain decoding,
greedy or sampled. A draft model draws with the same random numbers as the engine, so that both
often draw the same token.
"""

import abc
import dataclasses
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm.errors import UserError, check_size
from lm.generate.scheduler import Job
from lm.model import Model

if TYPE_CHECKING:
    from lm.generate.engine import Engine


class Speculation(abc.ABC):
    """Base class of what proposes drafts, of at most `tokens` tokens."""

    tokens: int

    def begin(self, engine: "Engine") -> None:  # noqa: B027
        """Called once, by the engine that it proposes for."""

    def warm_up(self) -> None:  # noqa: B027
        """Compiles what it needs."""

    @abc.abstractmethod
    def propose(self, jobs: Sequence[Job]) -> dict[Job, list[int]]:
        """Tokens that may follow the tokens of each job. Jobs may be left out."""


class NGram(Speculation):
    """Proposes what followed the last time that the last tokens occurred (prompt lookup).

    Args:
      tokens: of a draft.
      longest, shortest: tokens that must occur again; longer ones are tried first.
    """

    def __init__(self, tokens: int = 4, longest: int = 4, shortest: int = 2):
        check_size(tokens=tokens, longest=longest, shortest=shortest)
        self.tokens, self.sizes = tokens, range(longest, shortest - 1, -1)
        self._occurrences: weakref.WeakKeyDictionary[Job, _Occurrences] = (
            weakref.WeakKeyDictionary()
        )

    def propose(self, jobs: Sequence[Job]) -> dict[Job, list[int]]:
        """See `Speculation.propose`."""
        drafts = {}
        for job in jobs:
            if job not in self._occurrences:
                self._occurrences[job] = _Occurrences(self.sizes)
            start = self._occurrences[job].find(job.tokens)
            if start is not None:
                drafts[job] = job.tokens[start : start + self.tokens]
        return drafts


class _Occurrences:
    """Where runs of tokens occurred in a sequence that grows."""

    def __init__(self, sizes: range):
        self._sizes, self._read = sizes, 0
        self._end: dict[tuple[int, ...], int] = {}

    def find(self, tokens: Sequence[int]) -> int | None:
        """The place after an earlier occurrence of the last tokens."""
        for end in range(self._read + 1, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._end[tuple(tokens[end - size : end])] = end
        self._read = max(self._read, len(tokens) - 1)
        for size in self._sizes:
            if size < len(tokens) and (end := self._end.get(tuple(tokens[-size:]))) is not None:
                return end
        return None


class DraftModel(Speculation):
    """Proposes what a smaller model with the same vocabulary would write.

    Args:
      model: the smaller model, with weights in the dtype of arithmetic.
      tokens: of a draft.
      options: of its Engine, such as `cache_tokens`; default: those of the engine.
    """

    def __init__(self, model: Model, tokens: int = 4, **options: Any):
        check_size(tokens=tokens)
        self.model, self.tokens, self._options = model, tokens, options
        self._shadows: dict[Job, Job] = {}

    def begin(self, engine: "Engine") -> None:
        """Builds the engine of the draft model."""
        model, of = self.model.config, engine.model.config
        if model.vocab != of.vocab:
            raise UserError(
                f"The draft model has a vocabulary of {model.vocab} tokens, and the model one of "
                f"{of.vocab}; they must be the same."
            )
        options = {"rows": engine.rows, "exact": False}
        options |= {"cache_tokens": engine.cache_tokens, "page": engine.page}
        self._engine = type(engine)(
            self.model,
            context=engine.context,
            # What it computes for a draft is replaced when the engine draws another token.
            prefix_caching=False,
            **{**options, **self._options},
        )
        self._engine.scheduler.slack = self.tokens

    def warm_up(self) -> None:
        """Compiles the programs of the draft model."""
        self._engine.warm_up()

    def propose(self, jobs: Sequence[Job]) -> dict[Job, list[int]]:
        """See `Speculation.propose`."""
        for job in [job for job in self._shadows if job.result.finished]:
            self._engine.cancel(self._shadows.pop(job))
        for shadow in self._shadows.values():
            shadow.paused = True
        drafting = {job: self._shadow(job) for job in jobs if len(job.tokens) < self._limit}
        before = -1
        while before < self._engine.computed and not all(s.paused for s in drafting.values()):
            before = self._engine.computed
            self._engine.step()
            for job, shadow in drafting.items():
                shadow.paused = len(shadow.tokens) >= len(job.tokens) + self.tokens
        return {job: shadow.tokens[len(job.tokens) :] for job, shadow in drafting.items()}

    @property
    def _limit(self) -> int:
        """Longer sequences get no draft: it would fill the context."""
        return self._engine.context - self.tokens - 1

    def _shadow(self, job: Job) -> Job:
        """The job of the draft model that follows `job`, with its tokens."""
        if job not in self._shadows:
            request = dataclasses.replace(
                job.request,
                prompt=job.tokens[: job.prompt],
                max_tokens=self._engine.context,
                stop_tokens=(),
                guide=None,
                logprobs=0,
                prompt_logprobs=False,
            )
            self._shadows[job] = self._engine.add(request)
        shadow = self._shadows[job]
        # Before the last draft, its tokens are those of the job.
        same = max(0, len(shadow.tokens) - self.tokens)
        while shadow.tokens[same : same + 1] == job.tokens[same : same + 1] != []:
            same += 1
        shadow.computed = min(shadow.computed, same)
        shadow.tokens = list(job.tokens)
        shadow.result.tokens = list(job.result.tokens)
        shadow.paused = False
        return shadow
