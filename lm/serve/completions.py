"""POST /v1/completions."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from lm.generate.text import Begin, begin
from lm.serve.errors import ApiError
from lm.serve.generation import Choice, bounded, requests, token_text
from lm.serve.protocol import CompletionRequest
from lm.serve.variants import Variant
from lm.serve.worker import Call


class Completion:
    """A request for completions: how it becomes a call, and the call an answer.

    call      for the worker
    choices   one for each of its sequences
    tokens    of the prompts
    """

    def __init__(self, variant: Variant, options: CompletionRequest):
        self.options, self._variant = options, variant
        drawn = max(options.n, options.best_of or 1)
        if options.stream and drawn > options.n:
            message = "best_of above n cannot be streamed; leave out stream or best_of."
            raise ApiError(400, message, param="best_of", code="invalid_value")
        if options.best_of is not None and options.best_of < options.n:
            raise ApiError(400, "best_of must be at least n.", param="best_of")
        self._prompts = [self._prompt(prompt) for prompt in options.prompt]
        self._drawn = drawn
        wants_prompt = options.echo and options.logprobs is not None
        made = requests(
            variant,
            options,
            self._prompts,
            max_tokens=max(1, options.max_tokens),  # the engine always draws a token
            stop_tokens=variant.tokenizer.stops,
            logprobs=options.logprobs or 0,
            prompt_logprobs=wants_prompt,
            choices=drawn,
            param="prompt",
        )
        self.call = Call(variant, made, incremental=options.stream or bool(options.stop))
        self.choices = [
            Choice(i, variant.tokenizer, options.stop, self._prompts[i // drawn].spaces)
            for i in range(len(made))
        ]
        self.tokens = sum(len(prompt.ids) for prompt in self._prompts)
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._begun: dict[int, _Written] = {}

    def _prompt(self, prompt: str | list[int]) -> Begin:
        if not isinstance(prompt, str):
            return Begin(prompt)
        return begin(self._variant.tokenizer, prompt, self.options.is_guided)

    def answer(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        options, drawn = self.options, self._drawn
        chosen = []
        for start in range(0, len(self.choices), drawn):
            of_prompt = self.choices[start : start + drawn]
            if drawn > options.n:
                of_prompt = sorted(of_prompt, key=lambda choice: -choice.logprob)[: options.n]
            chosen += of_prompt
        choices = [
            self._choice(number, self._echo(choice) + self._text(choice), choice, choice.finish)
            for number, choice in enumerate(chosen)
        ]
        return {**self._head(), "choices": choices, "usage": self.usage()}

    async def chunks(
        self, pieces: AsyncIterator[tuple[Choice, str]]
    ) -> AsyncIterator[dict[str, Any]]:
        """The bodies of the chunks of a streamed answer."""
        async for choice, piece in pieces:
            if not self.options.max_tokens:
                piece = ""
            if choice.index not in self._begun:
                piece = self._echo(choice) + piece
            known = self._begun.get(choice.index, _Written()).tokens
            wants = self.options.logprobs is not None and choice.count > known
            if piece or wants or choice.finish:
                yield {
                    **self._head(),
                    "choices": [self._choice(choice.index, piece, choice, choice.finish)],
                }

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts, each counted once, and of all that was generated."""
        written = sum(self._count(choice) for choice in self.choices)
        return usage(self.tokens, written, self.cached)

    @property
    def cached(self) -> int:
        """Tokens of the prompts that were in the cache."""
        return sum(choice.output.cached for choice in self.choices[:: self._drawn])

    def head(self) -> dict[str, Any]:
        """The last chunk's fields, when it has nothing but usage."""
        return {**self._head(), "choices": []}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._variant.name,
            "system_fingerprint": self._variant.fingerprint,
        }

    def _count(self, choice: Choice) -> int:
        return choice.count if self.options.max_tokens else 0

    def _text(self, choice: Choice) -> str:
        return choice.text if self.options.max_tokens else ""

    def _echo(self, choice: Choice) -> str:
        if not self.options.echo:
            return ""
        prompt = self.options.prompt[choice.index // self._drawn]
        return prompt if isinstance(prompt, str) else self._variant.tokenizer.decode(prompt)

    def _choice(self, number: int, text: str, choice: Choice, finish: str | None) -> dict[str, Any]:
        """A choice with its new text, and the log-probabilities of its new tokens."""
        logprobs = None
        written = self._begun.setdefault(choice.index, _Written())
        if self.options.logprobs is not None:
            logprobs = self._logprobs(choice, written)
        finish = finish and ("length" if not self.options.max_tokens else finish)
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, choice: Choice, written: "_Written") -> dict[str, list[Any]]:
        prompt = self._prompts[choice.index // self._drawn]
        output, tokenizer = choice.output, self._variant.tokenizer
        lines: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }

        def add(token: int, logprob: float | None, top: Any) -> None:
            text, spelled = token_text(tokenizer, token)
            start = written.offset
            written.offset += len(written.decoder.push([token]))
            if text.encode() == spelled:  # incomplete characters before it are now in the text
                start = written.offset - len(text)
            lines["tokens"].append(text)
            lines["token_logprobs"].append(bounded(logprob))
            lines["top_logprobs"].append(top)
            lines["text_offset"].append(max(0, start - written.spaces))

        if written.decoder is None:
            written.decoder, written.spaces = tokenizer.stream(), prompt.spaces
            if self.options.echo:
                written.spaces = 0
                for i, token in enumerate(prompt.ids):
                    top = choice.prompt_top[i] if i < len(choice.prompt_top) else None
                    known = output.prompt_logprobs[i]
                    add(token, known, self._top(token, known, top) if top is not None else None)
        for i in range(written.tokens, self._count(choice)):
            token, logprob = output.tokens[i], output.logprobs[i]
            top = output.top[i] if self.options.logprobs else []
            add(token, logprob, self._top(token, logprob, top))
        written.tokens = self._count(choice)
        return lines

    def _top(self, token: int, logprob: float | None, top: Any) -> dict[str, float]:
        """Text and log-probability of the most probable tokens, and of the token itself."""
        tokenizer = self._variant.tokenizer
        best = {token_text(tokenizer, i)[0]: bounded(p) for i, p in top}
        if logprob is not None:
            best.setdefault(token_text(tokenizer, token)[0], bounded(logprob))
        return best


class _Written:
    """How much of a choice's log-probabilities has been sent: tokens, and characters of text."""

    def __init__(self) -> None:
        self.tokens = self.offset = self.spaces = 0
        self.decoder: Any = None


class _Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def usage(prompt: int, written: int, cached: int) -> dict[str, Any]:
    """The field `usage`."""
    fields = _Usage(prompt, written, prompt + written)._asdict()
    return {**fields, "prompt_tokens_details": {"cached_tokens": cached}}
