"""POST /v1/chat/completions."""

import re
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from lm.data import encode_prompt, end_of_turn
from lm.errors import UserError
from lm.generate.text import Begin
from lm.serve.completions import usage
from lm.serve.errors import ApiError
from lm.serve.generation import Choice, bounded, requests, token_text
from lm.serve.protocol import ChatRequest
from lm.serve.tools import ToolReader
from lm.serve.variants import Variant
from lm.serve.worker import Call


class Chat:
    """A request for the next message of a conversation; the attributes of `Completion`."""

    def __init__(self, variant: Variant, options: ChatRequest):
        self.options, self._variant = options, variant
        if options.top_logprobs and not options.logprobs:
            message = "top_logprobs needs logprobs=true."
            raise ApiError(400, message, param="top_logprobs", code="invalid_value")
        self._tools = options.tools if options.tool_choice == "auto" else []
        prompt = Begin(encode_prompt(self._render(), variant.tokenizer))
        ends, end_texts = end_of_turn(variant.tokenizer)
        limits = (options.max_tokens, options.max_completion_tokens)
        most = min((limit for limit in limits if limit is not None), default=variant.context)
        made = requests(
            variant,
            options,
            [prompt],
            max_tokens=most,
            stop_tokens=ends,
            logprobs=options.top_logprobs,
            choices=options.n,
            param="messages",
        )
        stops = [*options.stop, *(() if options.ignore_eos else end_texts)]
        self.call = Call(variant, made, incremental=options.stream or bool(options.stop))
        self.choices = [Choice(i, variant.tokenizer, stops) for i in range(len(made))]
        self.tokens = len(prompt.ids)
        self._readers = [self._tool_reader() for _ in made]
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._sent: dict[int, int] = {}  # tokens whose log-probabilities were sent

    def _render(self) -> str:
        template, more = self._variant.template, {}
        if self._tools:
            if not re.search(r"\btools\b", template.source):
                raise ApiError(
                    400,
                    f"The chat template of {self._variant.name} has no place for tools; leave "
                    "them out, or serve a model that was trained with tools.",
                    param="tools",
                    code="unsupported_parameter",
                )
            more["tools"] = [tool.model_dump(exclude_none=True) for tool in self._tools]
        try:
            return template.render(self.options.messages, add_generation_prompt=True, **more)
        except UserError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None

    def _tool_reader(self) -> ToolReader | None:
        if not self._tools:
            return None
        names = {tool.function.name for tool in self._tools}
        return ToolReader(names, None if self.options.parallel_tool_calls else 1)

    def answer(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for choice in self.choices:
            content, calls = self._split(choice, choice.text)
            message = {"role": "assistant", "content": content, "refusal": None}
            if calls:
                for call in calls:
                    del call["index"]
                message |= {"content": content.strip() or None, "tool_calls": calls}
            choices.append(
                {
                    "index": choice.index,
                    "message": message,
                    "logprobs": self._logprobs(choice),
                    "finish_reason": self._finish(choice),
                }
            )
        head = {**self._head("chat.completion"), "choices": choices}
        return {**head, "usage": self.usage()}

    async def chunks(
        self, pieces: AsyncIterator[tuple[Choice, str]]
    ) -> AsyncIterator[dict[str, Any]]:
        """The bodies of the chunks of a streamed answer."""
        begun = set()
        async for choice, piece in pieces:
            if choice.index not in begun:
                begun.add(choice.index)
                yield self._chunk(choice, {"role": "assistant", "content": "", "refusal": None})
            content, calls = self._split(choice, piece)
            logprobs = self._logprobs(choice)
            delta: dict[str, Any] = {"content": content} if content or not calls else {}
            if calls:
                delta["tool_calls"] = calls
            if content or calls or logprobs:
                yield self._chunk(choice, delta, logprobs)
            if choice.finish:
                yield self._chunk(choice, {}, finish=self._finish(choice))

    def _split(self, choice: Choice, piece: str) -> tuple[str, list[dict[str, Any]]]:
        """(text, calls of tools) in new text."""
        reader = self._readers[choice.index]
        if reader is None:
            return piece, []
        content, calls = reader.read(piece)
        if choice.finish:
            more, others = reader.finish()
            content, calls = content + more, calls + others
        return content, calls

    def _finish(self, choice: Choice) -> str:
        reader = self._readers[choice.index]
        is_call = reader is not None and reader.found and choice.finish == "stop"
        return "tool_calls" if is_call else choice.finish

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt, and of all that was generated."""
        return usage(self.tokens, sum(choice.count for choice in self.choices), self.cached)

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were in the cache."""
        return self.choices[0].output.cached

    def head(self) -> dict[str, Any]:
        """The last chunk's fields, when it has nothing but usage."""
        return {**self._head("chat.completion.chunk"), "choices": []}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._variant.name,
            "system_fingerprint": self._variant.fingerprint,
        }

    def _chunk(
        self, choice: Choice, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        of_choice = {"index": choice.index, "delta": delta, "logprobs": logprobs}
        choices = [{**of_choice, "finish_reason": finish}]
        return {**self._head("chat.completion.chunk"), "choices": choices}

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Log-probabilities of the tokens that are new; None if they are not wanted, or none is."""
        start, output = self._sent.get(choice.index, 0), choice.output
        if not self.options.logprobs or choice.count <= start:
            return None
        self._sent[choice.index] = choice.count
        content = []
        for i in range(start, choice.count):
            top = output.top[i] if self.options.top_logprobs else []
            content.append(
                {
                    **self._token(output.tokens[i], output.logprobs[i]),
                    "top_logprobs": [self._token(*each) for each in top],
                }
            )
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, spelled = token_text(self._variant.tokenizer, token)
        return {"token": text, "logprob": bounded(logprob), "bytes": list(spelled)}
