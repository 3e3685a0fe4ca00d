"""Conversations: read from JSON in the common shapes, rendered by a chat template, and encoded with
the loss on what the assistant writes."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm.data.chat_template import DEFAULT, ChatTemplate
from lm.data.file_sources import FileSource, json_records
from lm.data.sources import Encoded
from lm.data.tokenizer import CHAT_SYMBOLS, Tokenizer
from lm.data.tokenizer_json import JsonTokenizer
from lm.errors import UserError, check_name

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "prompter": "user", "function": "tool"}
# Fields of a prompt and of the answer to it.
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))

Conversation = list[dict[str, Any]]  # messages {"role": ..., "content": ...}


@dataclass(frozen=True, kw_only=True)
class Chat(FileSource):
    """Conversations in .jsonl or .json files, one JSON object each, in one of these shapes:

        {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}
        {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}   ShareGPT
        {"instruction": "...", "input": "...", "output": "..."}                        Alpaca
        {"prompt": "...", "completion": "..."}, "response" instead, or question and answer

    The loss is on the assistant's messages, with the token that ends each of them.

    system    a first message for conversations that have none
    template  Jinja; None: the tokenizer's own, or that of CHAT_SYMBOLS
    train     "all" messages of the assistant, or the "last" one of each conversation
    """

    system: str | None = None
    template: str | None = None
    train: str = "all"

    splits_text = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("data.train", self.train, ("all", "last"))

    def read_file(self, path: str) -> Iterator[str]:
        for where, record in json_records(path):
            messages = conversation(record, where)
            if self.system is not None and messages[0]["role"] not in ("system", "developer"):
                messages = [{"role": "system", "content": self.system}, *messages]
            yield json.dumps({"messages": messages}, ensure_ascii=False)

    def plain_text(self, document: str) -> str:
        return "\n".join(str(m["content"]) for m in json.loads(document)["messages"])

    def encode(self, documents: Sequence[str], tokenizer: Tokenizer) -> list[Encoded]:
        template = chat_template(tokenizer, self.template)
        return [
            self._encode(json.loads(each)["messages"], template, tokenizer) for each in documents
        ]

    def _encode(
        self, messages: Conversation, template: ChatTemplate, tokenizer: Tokenizer
    ) -> Encoded:
        try:
            text, spans = template.spans(messages)
        except UserError as error:
            first = str(messages[0]["content"])[:40]
            raise UserError(f"data: the conversation that begins {first!r}: {error}") from None
        trained = spans if self.train == "all" else spans[-1:]
        ids, weights = encode_spans(text, trained, tokenizer)
        return Encoded(ids, weights, sum(len(text[a:b].encode()) for a, b in trained))


def chat_template(tokenizer: Tokenizer, source: str | None = None) -> ChatTemplate:
    """The template `source`; None: that of the tokenizer, or DEFAULT if it has CHAT_SYMBOLS.

    Raises UserError for a tokenizer without either.
    """
    source = tokenizer.chat_template if source is None else source
    if source is None:
        if not set(CHAT_SYMBOLS) <= set(tokenizer.symbols):
            raise UserError(
                "The tokenizer has no chat template; train it with symbols=data.CHAT_SYMBOLS, or "
                "give one, as in data.Chat(..., template=...)."
            )
        source = DEFAULT
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad, "unk": tokenizer.unk}
    special = {f"{role}_token": tokenizer.piece(i) if i >= 0 else "" for role, i in ids.items()}
    return ChatTemplate(source, special)


def encode_spans(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights) of a rendered conversation, with weight 1 on the tokens of the spans and on
    the special token that ends each of them.

    Each part is encoded alone, as in generation, where the prompt is encoded before the answer
    exists. The ids begin with the begin token once.
    """
    if tokenizer.adds_space:
        ids, weights = _encode_whole(text, spans, tokenizer)
    else:
        ids, weights, position = [], [], 0
        for start, stop in [*spans, (len(text), len(text))]:
            for part, weight in ((text[position:start], 0), (text[start:stop], 1)):
                new = _encode(part, tokenizer)
                ids += new
                weights += [weight] * len(new)
            position = stop
    _weigh_ends(ids, weights, tokenizer)
    begun = _begun(ids, tokenizer)
    weights = [0] * (len(begun) - len(ids)) + weights
    return np.array(begun, np.int32), np.array(weights, np.uint8)


def encode_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a rendered conversation up to the assistant's answer, with the begin token once."""
    return _begun(_encode(text, tokenizer), tokenizer)


def end_of_turn(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The ids that end an answer, and those of them that are text, as the end in DEFAULT is."""
    texts = (CHAT_SYMBOLS[-1],) if CHAT_SYMBOLS[-1] in tokenizer.symbols else ()
    return (*tokenizer.stops, *(tokenizer.encode(text)[0] for text in texts)), texts


def _begun(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """With the begin token in front, which a template may have written already."""
    return ids if ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a part of a rendered conversation, in which a template may spell special tokens."""
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.encode(text)
    if tokenizer.adds_space:
        raise UserError(
            "A tokenizer.model that adds a space before texts has no special tokens in them; use "
            "the model's tokenizer.json for conversations."
        )
    controls = {tokenizer.piece(i): i for i in (tokenizer.bos, tokenizer.eos, tokenizer.pad)}
    parts = re.split(f"({'|'.join(map(re.escape, controls))})", text)
    encoded = [[controls[part]] if part in controls else tokenizer.encode(part) for part in parts]
    return list(itertools.chain.from_iterable(encoded))


def _encode_whole(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """For a tokenizer that adds a space before every text, and so cannot encode parts alone: the
    ids of a beginning must be the beginning of the ids."""
    ids = _encode(text, tokenizer)
    weights = [0] * len(ids)
    for start, stop in spans:
        first = len(_encode(text[:start], tokenizer))
        answered = _encode(text[:stop], tokenizer)
        last = len(answered)
        if answered != ids[:last]:
            raise UserError(
                f"data: the tokenizer joins the end of {text[start:stop][-20:]!r} with what "
                "follows in the chat template, so the loss cannot end there."
            )
        weights[first:last] = [1] * (last - first)
    return ids, weights


def _weigh_ends(ids: list[int], weights: list[int], tokenizer: Tokenizer) -> None:
    """Sets the weight of the special token that follows each span, and of white space before it.
    Appends the end token if the last span is at the end and nothing ends it."""
    ends = [i for i in range(1, len(ids)) if weights[i - 1] and not weights[i]]
    for end in ends:
        special = end
        while special < len(ids) and not _is_special(ids[special], tokenizer):
            if tokenizer.decode_bytes(ids[special : special + 1]).strip():
                break
            special += 1
        if special < len(ids) and _is_special(ids[special], tokenizer):
            weights[end : special + 1] = [1] * (special + 1 - end)
    if weights[-1] and not _is_special(ids[-1], tokenizer):
        ids.append(tokenizer.eos)
        weights.append(1)


def _is_special(token: int, tokenizer: Tokenizer) -> bool:
    return not tokenizer.decode_bytes([token]) or tokenizer.piece(token) in tokenizer.symbols


# ---- Shapes


def conversation(record: Mapping[str, Any], where: str) -> Conversation:
    """The messages of a JSON object. Raises UserError, with `where`, for one that is not a
    conversation with an answer."""
    messages = _messages(record, where)
    if not messages:
        raise UserError(f"{where} is a conversation without messages.")
    for message in messages:
        check_name(f"{where}: role", message["role"], ROLES)
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise UserError(f"{where}: the content of a message is {kind}, not text.")
    roles = [message["role"] for message in messages]
    if late := {"system", "developer"} & set(roles[1:]):
        raise UserError(f"{where}: a {min(late)} message must be the first one.")
    if "assistant" not in roles:
        raise UserError(f"{where} has no message of the assistant to learn from.")
    if roles[roles[0] in ("system", "developer")] == "assistant":
        raise UserError(f"{where} begins with the assistant; a user's message comes first.")
    if any(a == b and a in ("user", "assistant") for a, b in itertools.pairwise(roles)):
        raise UserError(f"{where} has two messages of the same role in a row.")
    if any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
        raise UserError(f"{where} has an empty message of the assistant.")
    return messages


def _messages(record: Mapping[str, Any], where: str) -> Conversation:
    if "messages" in record:
        return [
            _message(each, "role", "content", where) for each in _list(record["messages"], where)
        ]
    if "conversations" in record:
        turns = _list(record["conversations"], where)
        names = ("from", "value") if turns and "from" in turns[0] else ("role", "content")
        return [_message(each, *names, where) for each in turns]
    if "instruction" in record and "output" in record:
        more = record.get("input")
        prompt = f"{record['instruction']}\n\n{more}" if more else record["instruction"]
        return _turn(prompt, record["output"])
    for prompt, answer in _PAIRS:
        if prompt in record and answer in record:
            if isinstance(record[prompt], list):
                return _messages({"messages": record[prompt] + _list(record[answer], where)}, where)
            return _turn(record[prompt], record[answer])
    raise UserError(
        f"{where} is no conversation; it needs messages, conversations, instruction and output, or "
        f"prompt and completion. Its fields: {', '.join(record)}."
    )


def _turn(prompt: Any, answer: Any) -> Conversation:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _list(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UserError(f"{where}: messages must be a list of objects.")
    return value


def _message(message: Mapping[str, Any], role: str, content: str, where: str) -> dict[str, Any]:
    for name in (role, content):
        if name not in message:
            raise UserError(f"{where}: a message has no {name!r}.")
    name = message[role]
    return {"role": _SHAREGPT.get(name, name), "content": message[content]}
