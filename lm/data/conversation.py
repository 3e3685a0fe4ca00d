"""Conversations in JSON records: one function for each kind of record, over the shapes that data
sets have."""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from lm import terminal
from lm.errors import UserError, check_name

ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLE_OF = {"human": "user", "gpt": "assistant", "prompter": "user", "function": "tool"}
# Fields of a prompt, of the answer to it, and of a system message beside them.
_PROMPTS = ("instruction", "prompt", "question")
_ANSWERS = ("output", "completion", "response", "answer")
_SYSTEMS = ("system", "system_prompt")

Conversation = list[dict[str, Any]]  # messages {"role": ..., "content": ...}


class Unusable(UserError):
    """A record of a known shape whose content cannot be trained on.

    where  its file and line
    fault  what is wrong with it, as in 'has an empty message of the assistant'
    """

    def __init__(self, where: str, fault: str):
        super().__init__(f"{where} {fault}.")
        self.where, self.fault = where, fault


class Unused:
    """Counts the records of a file that are left out, by their fault."""

    def __init__(self) -> None:
        self._records: dict[str, list[str]] = {}

    def add(self, record: Unusable) -> None:
        self._records.setdefault(record.fault, []).append(record.where)

    def note(self, where: str, total: int) -> None:
        """Prints how many of `total` records in `where` are left out, and why. Raises UserError if
        all of them are."""
        count = sum(map(len, self._records.values()))
        if not count:
            return
        groups = sorted(self._records.items(), key=lambda item: -len(item[1]))
        reasons = "; ".join(
            f"{len(each):,} like {each[0].removeprefix(f'{where}, ')}, which {fault}"
            for fault, each in groups
        )
        if count == total:
            raise UserError(f"{where}: none of {total:,} records can be trained on: {reasons}.")
        terminal.note_once(f"{where}: left out {count:,} of {total:,} records: {reasons}.")


def conversation(record: Mapping[str, Any], where: str) -> Conversation:
    """The messages of a record. Raises UserError, with `where`, for one that is no conversation,
    and Unusable for one without an answer to learn from."""
    prompt = _prompt(record, where)
    if "chosen" in record:
        return _checked(_continued(prompt, record["chosen"], where), where)
    if prompt is not None and _is_list(record):
        return _checked(prompt, where)
    answer = next((name for name in _ANSWERS if name in record), None)
    if prompt is None or answer is None:
        raise UserError(
            f"{where} is no conversation; it needs messages, conversations, instruction and "
            f"output, or prompt and completion. Its fields: {', '.join(record)}."
        )
    return _checked(_continued(prompt, record[answer], where), where)


def pair(record: Mapping[str, Any], where: str) -> tuple[Conversation, Conversation]:
    """The conversations with the chosen and with the rejected answer. They differ in their last
    message. Raises UserError, with `where`, for a record that is no pair, and Unusable for one
    that cannot be trained on."""
    if "chosen" not in record or "rejected" not in record:
        raise UserError(
            f"{where} is no preference pair; it needs chosen and rejected. "
            f"Its fields: {', '.join(record)}."
        )
    prompt = _prompt(record, where)
    chosen, rejected = (
        _answered(_checked(_continued(prompt, record[name], where), where), where)
        for name in ("chosen", "rejected")
    )
    if chosen[:-1] != rejected[:-1]:
        raise Unusable(where, "has two conversations that differ before the last answer")
    if chosen[-1]["content"].strip() == rejected[-1]["content"].strip():
        raise Unusable(where, "has equal chosen and rejected answers")
    return chosen, rejected


def rated(record: Mapping[str, Any], where: str) -> tuple[Conversation, bool]:
    """A conversation that ends with an answer, and whether the answer is desirable."""
    label = record.get("label")
    if not isinstance(label, bool):
        found = f"it is {label!r}" if "label" in record else f"its fields: {', '.join(record)}"
        raise UserError(f"{where} needs a label that is true or false; {found}.")
    return _answered(conversation(record, where), where), label


def number(record: Mapping[str, Any], field: str, where: str) -> float:
    """A field of data.curriculum. Raises UserError, with `where`, for what is no number."""
    check_name(f"{where}: data.curriculum", field, ("length", "turns", *record))
    value = record[field]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value)):
        raise UserError(
            f"{where}: field {field!r} of data.curriculum holds {value!r}, not a number."
        )
    return float(value)


def _checked(messages: Conversation, where: str) -> Conversation:
    """The messages, if a model can be trained on them."""
    if not messages:
        raise Unusable(where, "is a conversation without messages")
    for message in messages:
        check_name(f"{where}: role", message["role"], ROLES)
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise UserError(f"{where}: the content of a message is {kind}, not text.")
    roles = [message["role"] for message in messages]
    if late := {"system", "developer"} & set(roles[1:]):
        raise Unusable(where, f"has a {min(late)} message that is not the first one")
    if "assistant" not in roles:
        raise Unusable(where, "has no message of the assistant to learn from")
    if roles[roles[0] in ("system", "developer")] == "assistant":
        raise Unusable(where, "begins with the assistant")
    if any(a == b and a in ("user", "assistant") for a, b in itertools.pairwise(roles)):
        raise Unusable(where, "has two messages of the same role in a row")
    if any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
        raise Unusable(where, "has an empty message of the assistant")
    return messages


def _answered(messages: Conversation, where: str) -> Conversation:
    if messages[-1]["role"] != "assistant":
        raise Unusable(where, "does not end with an answer")
    return messages


# ---- Shapes


def _is_list(record: Mapping[str, Any]) -> bool:
    return "messages" in record or "conversations" in record


def _prompt(record: Mapping[str, Any], where: str) -> Conversation | None:
    """The messages of a record before `completion` or `chosen`; None if it has none."""
    name = next((n for n in ("messages", "conversations", *_PROMPTS) if n in record), None)
    if name is None:
        return None
    value, more = record[name], record.get("input")
    if _is_list(record) or isinstance(value, list):
        messages = _messages(value, where)
    elif _is_dialogue(value):
        messages = _dialogue(value)
        if not messages[-1]["content"]:  # '...\n\nAssistant:', where the answer follows
            messages.pop()
    else:
        text = f"{value}\n\n{more}" if name == "instruction" and more else value
        messages = [{"role": "user", "content": text}]
    system = next((record[n] for n in _SYSTEMS if record.get(n)), None)
    if system is not None and messages and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _continued(prompt: Conversation | None, answer: Any, where: str) -> Conversation:
    """The conversation with its answer, which is text, a message, messages, or all of it."""
    if isinstance(answer, list | dict):
        messages = _messages([answer] if isinstance(answer, dict) else answer, where)
        is_whole = prompt is None or (messages and messages[0]["role"] != "assistant")
        return messages if is_whole else prompt + messages
    if prompt is None and _is_dialogue(answer):
        return _dialogue(answer)
    if prompt is None:
        raise UserError(f"{where} has an answer without a prompt; add the field prompt.")
    return [*prompt, {"role": "assistant", "content": answer}]


def _messages(value: Any, where: str) -> Conversation:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UserError(f"{where}: messages must be a list of objects.")
    messages = []
    for message in value:
        names = ("from", "value") if "from" in message else ("role", "content")
        for name in names:
            if name not in message:
                raise UserError(f"{where}: a message has no {name!r}.")
        role, content = (message[name] for name in names)
        role = _ROLE_OF.get(role, role) if isinstance(role, str) else role
        messages.append({"role": role, "content": content})
    return messages


# The text of a conversation in Anthropic's HH-RLHF.
_TURN = re.compile("\n\n(Human|Assistant):")


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _dialogue(text: str) -> Conversation:
    """The messages of '\\n\\nHuman: ...\\n\\nAssistant: ...'."""
    _, *parts = _TURN.split(text)
    return [
        {"role": {"Human": "user", "Assistant": "assistant"}[name], "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]
