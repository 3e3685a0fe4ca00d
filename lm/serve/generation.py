"""From the fields of a request to those of the engine, and from tokens to text."""

import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.generate import Output, Request, Result, Sampling
from lm.generate.text import Begin, Reader
from lm.serve.errors import ApiError
from lm.serve.protocol import Options
from lm.serve.variants import Variant
from lm.serve.worker import Call, Continuation, Update, Worker

_REASONS = {"stop": "stop", "max_tokens": "length", "context": "length"}
LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this number


def requests(
    variant: Variant,
    options: Options,
    prompts: Sequence[Begin],
    *,
    max_tokens: int,
    stop_tokens: Sequence[int],
    logprobs: int,
    prompt_logprobs: bool = False,
    choices: int,
    param: str,
) -> list[Request]:
    """`choices` requests for each prompt. Raises ApiError 400."""
    for prompt in prompts:
        _check(prompt.ids, variant, param)
    biases = {int(token): bias for token, bias in options.logit_bias.items()}
    try:
        guide = _guide(variant, options, tuple(stop_tokens))
        sampling = Sampling(
            temperature=options.temperature,
            top_k=options.top_k if options.top_k > 0 else None,
            top_p=max(options.top_p, 1e-30),
            min_p=options.min_p or None,
            repetition_penalty=options.repetition_penalty,
        )
        seed = secrets.randbits(32) if options.seed is None else options.seed % 2**32
        ends = () if options.ignore_eos else stop_tokens
        return [
            Request(
                prompt=prompt.ids,
                first_tokens=prompt.first,
                max_tokens=max_tokens,
                sampling=sampling,
                seed=seed,
                index=index,
                stop_tokens=(*ends, *options.stop_token_ids),
                presence_penalty=options.presence_penalty,
                frequency_penalty=options.frequency_penalty,
                logit_bias=biases,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                guide=guide,
            )
            for prompt in prompts
            for index in range(choices)
        ]
    except UserError as error:
        raise ApiError(400, str(error), code="invalid_value") from None


def _check(ids: Sequence[int], variant: Variant, param: str) -> None:
    if len(ids) >= variant.context:
        raise ApiError(
            400,
            f"{param} has {len(ids)} tokens, and the context of {variant.name} ends at "
            f"{variant.context}; shorten it, or start the server with a larger --context.",
            param=param,
            code="context_length_exceeded",
        )
    if ids and not 0 <= max(ids) < variant.config.vocab:
        raise ApiError(
            400,
            f"{param} has token {max(ids)}; the vocabulary ends at {variant.config.vocab - 1}.",
            param=param,
            code="invalid_value",
        )


def _guide(variant: Variant, options: Options, ends: tuple[int, ...]) -> Any:
    """The guide of response_format or structured_outputs, for a text that `ends` may end; None
    without one."""
    wanted, more = options.response_format, options.structured_outputs
    if not options.is_guided:
        return None
    if wanted is not None and more is not None:
        raise UserError("Give response_format or structured_outputs, not both.")
    guides = variant.guides(ends)
    if more is not None:
        given = more.model_dump(exclude_none=True, by_alias=True)
        if len(given) != 1:
            raise UserError("structured_outputs must have one of json, regex, grammar and choice.")
        ((kind, value),) = given.items()
        if kind == "choice" and not value:
            raise UserError("structured_outputs.choice must have at least one text.")
        return getattr(guides, "json_schema" if kind == "json" else kind)(value)
    if wanted.type == "json_object":
        return guides.json_object()
    if wanted.json_schema is None:
        raise UserError("response_format.json_schema is missing.")
    return guides.json_schema(wanted.json_schema.schema_)


class Choice:
    """A sequence of a call as text.

    index    number in the answer
    text     so far, without what may still become a stop string
    finish   OpenAI's finish_reason; None while it goes on
    output   all tokens so far
    count    tokens of `output` that belong to the answer: up to the one that completes a stop
             string
    """

    def __init__(self, index: int, tokenizer: Tokenizer, stop: Sequence[str], spaces: int = 0):
        self.index, self.output = index, Output()
        self.prompt_top: list[Any] = []
        self._reader = Reader(tokenizer, stop, spaces)
        self._pieces: list[str] = []
        self.finish: str | None = None
        self.count = 0

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def append(self, update: Update) -> str:
        """Reads new tokens; returns the new text."""
        output = self.output
        output.tokens += update.tokens
        output.logprobs += update.logprobs
        output.top += update.top
        output.finished = update.finished
        output.prompt_logprobs += update.prompt_logprobs
        self.prompt_top += update.prompt_top
        output.cached = output.cached or update.cached
        piece = self._reader.read(Result(output.tokens, output.logprobs, output.finished))
        self._pieces.append(piece)
        self.count = len(output.tokens)
        if self._reader.stopped:
            self.count = len(self._reader.result().tokens)
            self.finish = "stop"
        elif output.finished:
            self.finish = _REASONS.get(output.finished, output.finished)
        return piece

    @property
    def logprob(self) -> float:
        """Mean log-probability of its tokens."""
        return sum(self.output.logprobs[: self.count]) / max(1, self.count)


async def follow(
    worker: Worker, call: Call, choices: Sequence[Choice]
) -> AsyncIterator[tuple[Choice, str]]:
    """(choice, new text) as tokens come, until all choices have finished. Raises ApiError.

    If the caller stops before that, the rest is cancelled. Use it in `contextlib.aclosing`.
    """
    going = dict(enumerate(call.continuations))
    try:
        while going:
            index, update = await call.queue.get()
            if index not in going:
                continue  # tokens after a stop string
            if update.error is not None:
                del going[index]
                raise update.error
            piece = choices[index].append(update)
            if choices[index].finish is not None:
                ended: Continuation = going.pop(index)
                if update.finished is None:
                    worker.cancel([ended])
            yield choices[index], piece
    finally:
        if going:
            worker.cancel(list(going.values()))


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """A token as text, and its bytes. One that is not whole characters is 'bytes:\\xe2\\x98', as at
    OpenAI; a special token is what its file calls it."""
    spelled = tokenizer.decode_bytes([token])
    if not spelled:
        return tokenizer.piece(token), b""
    try:
        return spelled.decode(), spelled
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled), spelled


def bounded(logprob: float | None) -> float | None:
    """A log-probability that JSON can hold."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
