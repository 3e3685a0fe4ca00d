"""Conversations: read from JSON in the common shapes, rendered by a chat template, and encoded with
the loss on what the assistant writes."""

import abc
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lm import terminal
from lm.data.chat_template import DEFAULT, ChatTemplate
from lm.data.conversation import Conversation, Unusable, Unused, conversation, number
from lm.data.file_sources import FileSource, json_records
from lm.data.sources import Encoded
from lm.data.tokenizer import CHAT_SYMBOLS, Tokenizer
from lm.data.tokenizer_json import JsonTokenizer
from lm.errors import UserError, check_name


@dataclass(frozen=True, kw_only=True)
class Conversations(FileSource):
    """Base class of sources whose records are conversations, in .jsonl or .json files.

    system       a first message for conversations that have none
    template     Jinja; None: the tokenizer's own, or that of CHAT_SYMBOLS
    curriculum   "length", "turns" or a field that holds a number: the first epoch goes from small
                 to large in ten stages, each shuffled; later epochs are shuffled as a whole
    bad_records  "error" at a record that cannot be trained on, or "skip": leave it out, and print
                 how many and why
    """

    system: str | None = None
    template: str | None = None
    curriculum: str | None = None
    bad_records: str = "error"

    splits_text = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("data.bad_records", self.bad_records, ("error", "skip"))

    @abc.abstractmethod
    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """An example for training, for JSON, with its "messages". Raises Unusable for a record that
        cannot be trained on."""

    @abc.abstractmethod
    def answers(self, example: dict[str, Any]) -> list["Answers"]:
        """The documents of an example: one, or a pair."""

    def examples(self, path: str) -> Iterator[dict[str, Any]]:
        """The examples of a file that can be trained on."""
        unused, total = Unused(), 0
        for where, record in json_records(path):
            total += 1
            try:
                example = self.example(record, where)
            except Unusable as error:
                if self.bad_records == "error":
                    raise UserError(
                        f"{where} {error.fault}; mend it, or set data.bad_records='skip' to leave "
                        "such records out."
                    ) from None
                unused.add(error)
                continue
            if self.curriculum not in (None, "length", "turns"):
                example["key"] = number(record, self.curriculum, where)
            yield example
        unused.note(path, total)

    def read_file(self, path: str) -> Iterator[str]:
        for example in self.examples(path):
            yield json.dumps(example, ensure_ascii=False)

    def plain_text(self, document: str) -> str:
        return "\n".join(str(m["content"]) for m in json.loads(document)["messages"])

    def encode(self, documents: Sequence[str], tokenizer: Tokenizer) -> list[Encoded]:
        template = chat_template(tokenizer, self.template)
        examples, refused = [], []
        for document in documents:
            example = json.loads(document)
            try:
                rendered = [each.render(template) for each in self.answers(example)]
            except Unusable as error:
                if self.bad_records == "error":
                    raise UserError(f"data: {error}") from None
                refused.append(error)
            else:
                examples.append((example, rendered))
        if refused:
            terminal.note_once(
                f"{self.label}: left out {len(refused):,} of {len(documents):,} records that the "
                f"chat template refuses, like this one: {refused[0]}"
            )
        together = iter(_encode_all([each for _, parts in examples for each in parts], tokenizer))
        encoded = []
        for example, rendered in examples:
            parts = [next(together) for _ in rendered]
            if self.paired:
                parts = [_extended(each, tokenizer) for each in parts]
            encoded += [each._replace(key=self._key(example, parts)) for each in parts]
        return encoded

    def with_system(self, messages: Conversation) -> Conversation:
        """The messages, with the message `system` if they have none."""
        if self.system is None or messages[0]["role"] in ("system", "developer"):
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def _key(self, example: dict[str, Any], parts: Sequence[Encoded]) -> float | None:
        match self.curriculum:
            case None:
                return None
            case "length":
                return sum(len(each.ids) for each in parts)
            case "turns":
                return sum(message["role"] == "assistant" for message in example["messages"])
        return example["key"]


@dataclass(frozen=True, kw_only=True)
class Chat(Conversations):
    """Conversations for supervised fine-tuning, one JSON object each, in one of these shapes:

        {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}
        {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}   ShareGPT
        {"instruction": "...", "input": "...", "output": "..."}                        Alpaca
        {"prompt": "...", "completion": "..."}, "response" instead, or question and answer
        {"prompt": "...", "chosen": "...", "rejected": "..."}                  the chosen answer

    The loss is on the assistant's messages, with the token that ends each of them.

    train  "all" messages of the assistant, or the "last" one of each conversation
    """

    train: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("data.train", self.train, ("all", "last"))

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {"messages": self.with_system(conversation(record, where))}

    def answers(self, example: dict[str, Any]) -> list["Answers"]:
        return [Answers(example["messages"], self.train)]


class Answers(NamedTuple):
    """A conversation, and which messages of the assistant in it have a loss.

    train   "all", or the "last" one
    weight  of their tokens, and of the token that ends each
    """

    messages: Conversation
    train: str
    weight: int = 1

    def render(self, template: ChatTemplate) -> "_Rendered":
        """Raises Unusable if the template refuses the conversation."""
        try:
            text, spans = template.spans(self.messages)
        except UserError as error:
            where = f"the conversation that begins {str(self.messages[0]['content'])[:40]!r}:"
            raise Unusable(where, str(error).rstrip(".")) from None
        return _Rendered(text, spans if self.train == "all" else spans[-1:], self.weight)


class _Rendered(NamedTuple):
    text: str
    spans: Sequence[tuple[int, int]]
    weight: int


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
    exists. The ids begin with the begin token once, if the tokenizer adds one to prompts.
    """
    (encoded,) = _encode_all([_Rendered(text, spans, 1)], tokenizer)
    return encoded.ids, encoded.weights


def _encode_all(conversations: Sequence[_Rendered], tokenizer: Tokenizer) -> list[Encoded]:
    """As `encode_spans`, for many conversations at once."""
    if tokenizer.adds_space:
        encoded = [_encode_whole(each.text, each.spans, tokenizer) for each in conversations]
    else:
        parts = [list(_parts(each.text, each.spans)) for each in conversations]
        together = iter(_encode([text for each in parts for text, _ in each], tokenizer))
        encoded = []
        for each in parts:
            ids, weights = [], []
            for _, weight in each:
                new = next(together)
                ids += new
                weights += [weight] * len(new)
            encoded.append((ids, weights))
    return [_finish(each, *tokens, tokenizer) for each, tokens in zip(conversations, encoded)]


def _parts(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """The parts of a text, and whether each is a span."""
    position = 0
    for start, stop in spans:
        yield text[position:start], 0
        yield text[start:stop], 1
        position = stop
    yield text[position:], 0


def _finish(
    conversation: _Rendered, ids: list[int], weights: list[int], tokenizer: Tokenizer
) -> Encoded:
    """With the begin token, and with a loss on the token that ends each span."""
    _weigh_ends(ids, weights, tokenizer)
    begun = _begun(ids, tokenizer)
    weights = [0] * (len(begun) - len(ids)) + weights
    size = sum(len(conversation.text[a:b].encode()) for a, b in conversation.spans)
    weights_t = np.array(weights, np.uint8) * np.uint8(conversation.weight)
    return Encoded(np.array(begun, np.int32), weights_t, size)


def _extended(encoded: Encoded, tokenizer: Tokenizer) -> Encoded:
    """With an end token that has no loss, so that the model reads the last token of the
    conversation, where a reward model gives its value."""
    ids = np.append(encoded.ids, np.int32(tokenizer.eos))
    return encoded._replace(ids=ids, weights=np.append(encoded.weights, np.uint8(0)))


def encode_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a rendered conversation up to the assistant's answer, with the begin token once if the
    tokenizer adds one to prompts."""
    return _begun(_encode([text], tokenizer)[0], tokenizer)


def end_of_turn(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The ids that end an answer, and those of them that are text, as the end in DEFAULT is."""
    texts = (CHAT_SYMBOLS[-1],) if CHAT_SYMBOLS[-1] in tokenizer.symbols else ()
    return (*tokenizer.stops, *(tokenizer.encode(text)[0] for text in texts)), texts


def _begun(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """With the begin token in front, if the tokenizer adds one and the template does not."""
    return ids if ids[:1] == [*tokenizer.prefix] else [*tokenizer.prefix, *ids]


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of parts of rendered conversations, in which a template may spell special tokens."""
    if isinstance(tokenizer, JsonTokenizer):
        return [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    if tokenizer.adds_space:
        raise UserError(
            "A tokenizer.model that adds a space before texts has no special tokens in them; use "
            "the model's tokenizer.json for conversations."
        )
    controls = {tokenizer.piece(i): i for i in (tokenizer.bos, tokenizer.eos, tokenizer.pad)}
    between = re.compile(f"({'|'.join(map(re.escape, controls))})")
    parts = [between.split(text) for text in texts]
    plain = [part for each in parts for part in each if part not in controls]
    encoded = iter(tokenizer.encode_batch(plain))
    return [
        [
            i
            for part in each
            for i in ([controls[part]] if part in controls else next(encoded).tolist())
        ]
        for each in parts
    ]


def _encode_whole(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """For a tokenizer that adds a space before every text, and so cannot encode parts alone: the
    ids of a beginning must be the beginning of the ids."""
    (ids,) = _encode([text], tokenizer)
    weights = [0] * len(ids)
    for start, stop in spans:
        begun, answered = _encode([text[:start], text[:stop]], tokenizer)
        first, last = len(begun), len(answered)
        for part, whole, end in ((begun, answered, start), (answered, ids, stop)):
            if part != whole[: len(part)]:
                raise UserError(
                    f"data: the tokenizer joins {text[:end][-20:]!r} with what follows it in a "
                    "conversation, so the loss cannot begin or end there; change the white space "
                    "there in the chat template."
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
