"""Requests to the generation engine and what they give."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from lm.errors import UserError, check_seed, check_size
from lm.generate.guide import Guide
from lm.generate.sampling import Sampling

MOST_LOGPROBS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate.

    Args:
      prompt: token ids, at least one.
      max_tokens: most tokens to generate.
      sampling: temperature, top-k, top-p, min-p, repetition penalty.
      seed, index: of the random numbers: those of row `index` of `decode.generate(key=seed)`.
      stop_tokens: ids that end the continuation.
      first_tokens: the ids that may come first; None: any.
      presence_penalty, frequency_penalty: subtracted from the logits of tokens in the continuation,
        once, and for each occurrence.
      logit_bias: {token: number added to its logit}; -inf forbids it.
      logprobs: how many of the most probable tokens to report at each position.
      prompt_logprobs: report log-probabilities of the prompt's tokens too.
      guide: what the continuation must be like: a JSON schema, a regular expression, a grammar.
    """

    prompt: Sequence[int]
    max_tokens: int = 64
    sampling: Sampling = Sampling()
    seed: int = 0
    index: int = 0
    stop_tokens: Sequence[int] = ()
    first_tokens: Sequence[int] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    logprobs: int = 0
    prompt_logprobs: bool = False
    guide: Guide | None = None

    def __post_init__(self) -> None:
        check_size(max_tokens=self.max_tokens)
        check_seed(seed=self.seed, index=self.index)
        if not isinstance(self.sampling, Sampling):
            raise UserError(f"sampling={self.sampling!r} must be a Sampling(...).")
        if not isinstance(self.guide, Guide | None):
            raise UserError(f"guide={self.guide!r} must be made by Guides(tokenizer).")
        if not isinstance(self.logit_bias, Mapping):
            raise UserError(f"logit_bias={self.logit_bias!r} must be {{token: number}}.")
        for name in ("prompt", "stop_tokens", "first_tokens", "logit_bias"):
            ids = getattr(self, name)
            if ids is not None and (isinstance(ids, str) or not all(map(_is_whole, ids))):
                raise UserError(f"{name} must hold token ids, whole numbers.")
        numbers = {f"logit_bias[{token}]": x for token, x in self.logit_bias.items()}
        numbers |= {name: getattr(self, name) for name in ("presence_penalty", "frequency_penalty")}
        for name, value in numbers.items():
            may_be = (-math.inf,) if name.startswith("logit_bias") else ()
            if not _is_number(value) or not (math.isfinite(value) or value in may_be):
                raise UserError(f"{name}={value!r} must be a finite number.")
        if not _is_whole(self.logprobs) or not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UserError(
                f"logprobs={self.logprobs!r} must be from 0 to {MOST_LOGPROBS}, the number of "
                "alternatives at each position."
            )

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before the filters."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.first_tokens is not None
            or self.guide is not None
        )


@dataclasses.dataclass
class Output:
    """What a request has so far.

    tokens, logprobs, finished   as in decode.Result; or 'error'
    error             one sentence, if finished is 'error'
    top               for each token, the most probable ones: [(id, log-probability), ...]
    prompt_logprobs   of each token of the prompt; None for the first
    prompt_top        the most probable tokens in place of each token of the prompt, if `logprobs`
                      asks for some; None for the first
    cached            tokens of the prompt whose keys were found in the cache
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finished: str | None = None
    error: str | None = None
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float | None] = dataclasses.field(default_factory=list)
    prompt_top: list[list[tuple[int, float]] | None] = dataclasses.field(default_factory=list)
    cached: int = 0


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
