"""Renders conversations with a Jinja chat template, and finds the parts that the model is to write.

A template is a program from a model's folder, so it runs in Jinja's sandbox.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from lm.errors import UserError

Message = Mapping[str, Any]  # {"role": ..., "content": ...}

# For a tokenizer that was trained here with data.CHAT_SYMBOLS.
DEFAULT = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_BEGIN, _END = "\ue0f0\ue0f1", "\ue0f2\ue0f3"  # private characters, which mark a message's content


class ChatTemplate:
    """A compiled chat template.

    Args:
      source: the Jinja template.
      special: texts of special tokens that it may use: {"bos_token": "<s>", ...}.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None):
        self.source, self._special = source, dict(special or {})
        try:
            self._template = _compile(source)
        except jinja2.TemplateError as error:
            raise UserError(f"The chat template is not valid Jinja: {error}.") from None

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a conversation; with `add_generation_prompt` up to where the assistant's
        answer begins. `tools` are those that the model may call, as OpenAI's API describes them.

        Raises UserError where the template refuses the conversation."""
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None if tools is None else list(tools),
                **self._special,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise UserError(f"The chat template refuses this conversation: {error}.") from None

    def spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and for each message of the assistant the (start, stop) of
        its content in the text.

        The contents are found by marks around them. A span begins earlier, where the model begins
        to write, if the conversation up to there is what `render` gives as a prompt.

        Raises UserError for a template that renders a marked message differently.
        """
        messages = [_stripped(message) for message in messages]
        text = self.render(messages)
        marked = self.render([_marked(message) for message in messages])
        pieces = marked.replace(_END, _BEGIN).split(_BEGIN)
        asked = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if "".join(pieces) != text or len(pieces) != 2 * len(asked) + 1:
            raise UserError(
                "The chat template changes the content of the assistant's messages, so what the "
                "model is to write cannot be told apart from the rest."
            )
        spans, position = [], 0
        for index, before, content in zip(asked, pieces[::2], pieces[1::2], strict=False):
            start = position + len(before)
            position = start + len(content)
            prompt = self._prompt(messages[:index])
            if prompt is not None and len(prompt) <= start and text.startswith(prompt):
                start = max(len(prompt), spans[-1][1] if spans else 0)
            spans.append((start, position))
        return text, spans

    def _prompt(self, messages: Sequence[Message]) -> str | None:
        try:
            return self.render(messages, add_generation_prompt=True)
        except UserError:  # a template may refuse a part of a conversation
            return None


def _stripped(message: Message) -> Message:
    """Templates strip contents or do not; without outer white space both do the same."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str):
        return message
    return {**message, "content": content.strip()}


def _marked(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    return {**message, "content": f"{_BEGIN}{message['content']}{_END}"}


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, with which some templates mark what the assistant
    writes, gives its content. The marks may leave out the end token, so they are not relied on."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """With the settings, filters and functions that templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    # Prepared text must not depend on the day. This is the date that Llama 3's template has.
    environment.globals["strftime_now"] = datetime.datetime(2024, 7, 26).strftime
    return environment.from_string(source)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
