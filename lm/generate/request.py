"""Requests to the generation engine and what they give."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lm.errors import UserError, check_seed, check_size
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

    def __post_init__(self) -> None:
        check_size(max_tokens=self.max_tokens)
        check_seed(seed=self.seed)
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)!r} must be a finite number.")
        if not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UserError(
                f"logprobs={self.logprobs} must be from 0 to {MOST_LOGPROBS}, the number of "
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
        )


@dataclasses.dataclass
class Output:
    """What a request has so far.

    tokens, logprobs, finished   as in decode.Result; 'error' if logits were not finite
    top               for each token, the most probable ones: [(id, log-probability), ...]
    prompt_logprobs   of each token of the prompt; None for the first
    cached            tokens of the prompt whose keys were found in the cache
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finished: str | None = None
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float | None] = dataclasses.field(default_factory=list)
    cached: int = 0
