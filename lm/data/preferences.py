"""Preference pairs, and answers with a label, for preference optimization and reward models.

An example becomes a pair of documents, one after another, which data.Pairs packs side by side.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lm.data.chat import Answers, Conversations
from lm.data.conversation import pair, rated
from lm.errors import UserError

DESIRABLE, UNDESIRABLE = 1, 2  # weights of an answer's tokens in Feedback


@dataclass(frozen=True, kw_only=True)
class Preferences(Conversations):
    """Preference pairs, one JSON object each, in one of these shapes:

        {"prompt": "...", "chosen": "...", "rejected": "..."}, question or instruction instead
        {"prompt": [messages], "chosen": [message], "rejected": [message]}
        {"chosen": [messages], "rejected": [messages]}                       whole conversations
        {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": "..."}    HH-RLHF

    The two conversations differ in their last message. A pair gives two documents: the prompt with
    the chosen answer, and with the rejected one, each with weight 1 on the answer and the token
    that ends it. By default records that are no pair, such as those with equal answers, are left
    out and counted.
    """

    bad_records: str = "skip"

    paired = True

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        chosen, rejected = map(self.with_system, pair(record, where))
        return {"messages": chosen, "rejected": rejected[-1]}

    def answers(self, example: dict[str, Any]) -> list[Answers]:
        chosen = example["messages"]
        return [Answers(chosen, "last"), Answers([*chosen[:-1], example["rejected"]], "last")]


@dataclass(frozen=True, kw_only=True)
class Feedback(Conversations):
    """Answers that are desirable or not, for KTO: conversations in the shapes of Chat with a label,
    as in {"prompt": "...", "completion": "...", "label": true}. They end with the answer.

    An example gives two documents: the prompt with its answer, of weight 1 if it is desirable and 2
    if not; and the prompt with the answer of the next example in the file, of weight 1, from which
    the objective estimates how far the model is from its reference.
    """

    bad_records: str = "skip"

    paired = True

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        messages, label = rated(record, where)
        return {"messages": self.with_system(messages), "label": label}

    def examples(self, path: str) -> Iterator[dict[str, Any]]:
        examples = super().examples(path)
        first = last = next(examples, None)
        for example in examples:
            yield {**last, "other": example["messages"][-1]}
            last = example
        if last is not first:
            yield {**last, "other": first["messages"][-1]}
        elif first is not None:
            raise UserError(f"{path} has a single example; KTO needs the answer of another one.")

    def answers(self, example: dict[str, Any]) -> list[Answers]:
        messages = example["messages"]
        weight = DESIRABLE if example["label"] else UNDESIRABLE
        other = [*messages[:-1], example["other"]]
        return [Answers(messages, "last", weight), Answers(other, "last")]
