"""From raw text to a model that answers questions, on a laptop: pre-training, supervised
fine-tuning (SFT) and preference optimization (DPO).

    python -m experiments.tiny_chat
    python -m lm chat runs/tiny_chat/dpo

Asks: can a model of a million weights learn to answer questions in its chat template, and can DPO
take long-winded answers away without making them wrong?

The text is the documentation of the running Python. The conversations are made by this file:
questions about functions, small sums, greetings. Half of the answers are long-winded; DPO compares
each with a concise one. The model is tested on questions that it has only seen in other words.

Answer: to the first, yes: after SFT 95 +- 3 % of 44 unseen questions are answered right, in 17.3 +-
1.2 words. To the second, partly: after DPO the answers have 9.9 +- 0.9 words, and 80 +- 6 % are
right. Eight minutes on two CPU cores (CPython 3.11.7, 2026-11-28, one seed).
"""

import functools
import hashlib
import importlib
import inspect
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pydoc_data import topics
from typing import Any

import numpy as np

from experiments.stages import Docstrings
from lm import checkpoint, data, evals, generate, model, objectives, optim
from lm.experiment import Experiment, Stage
from lm.main import main
from lm.parallel import Mesh, Place
from lm.recipe import Recipe

VOCAB, LENGTH = 4096, 256
MODULES = (
    *("builtins", "math", "random", "statistics", "operator", "os.path", "shutil", "tempfile"),
    *("glob", "fnmatch", "re", "json", "csv", "copy", "heapq", "bisect", "functools", "textwrap"),
    *("calendar", "base64", "threading", "urllib.parse"),
)
GREETINGS = {
    "Hello!": "Hello! What would you like to know?",
    "Who are you?": "I am a small language model, trained on the documentation of Python.",
    "Thanks!": "You are welcome.",
}


@functools.cache
def answers() -> dict[str, str]:
    """Questions with concise answers: the first sentence of a docstring, or a sum."""
    found = {}
    for module in MODULES:
        for name, function in inspect.getmembers(importlib.import_module(module)):
            sentence = re.match(r"[A-Z][^.()]{10,80}\.(?=\s|$)", inspect.getdoc(function) or "")
            if sentence and inspect.isroutine(function) and name[0] != "_":
                full = name if module == "builtins" else f"{module}.{name}"
                for question in ("What does {} do?", "Explain {}.", "What is {} for?"):
                    found[question.format(full)] = " ".join(sentence[0].split())
    for a in range(10):
        for b in range(10):
            for question in ("What is {} + {}?", "How much is {} plus {}?"):
                found[question.format(a, b)] = f"{a} + {b} = {a + b}."
    return found


def unseen() -> list[str]:
    """Questions that no stage trains on: every 23rd, so that all phrasings are among them."""
    return list(answers())[::23]


def seen() -> dict[str, str]:
    """The other questions, with their answers."""
    left_out = unseen()
    return {question: x for question, x in answers().items() if question not in left_out}


def long_winded(answer: str) -> str:
    """A longer version of an answer."""
    return f"That is a good question! {answer} There is much more to say, but I hope that helps."


class Made:
    """A source of conversations that `records` makes, instead of reading them from files."""

    def read(self) -> Iterator[str]:
        for record in self.records():
            yield json.dumps(self.example(record, type(self).__name__))

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(self.read()).encode()).hexdigest()

    def size(self) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Questions(Made, data.Chat):
    """Conversations of one or two turns: each question with a concise and a long-winded answer."""

    path: str = "made"

    def records(self) -> Iterator[dict[str, Any]]:
        draw = random.Random(0)
        for question, concise in seen().items():
            for answer in (concise, long_winded(concise)):
                turns = [(question, answer)]
                if draw.random() < 0.3:
                    turns = draw.sample([*turns, draw.choice(list(GREETINGS.items()))], 2)
                said = [text for turn in turns for text in turn]
                roles = ("user", "assistant") * len(turns)
                yield {"messages": [{"role": r, "content": c} for r, c in zip(roles, said)]}


@dataclass(frozen=True, kw_only=True)
class Comparisons(Made, data.Preferences):
    """Concise answers, preferred to long-winded ones."""

    path: str = "made"

    def records(self) -> Iterator[dict[str, Any]]:
        for question, answer in seen().items():
            yield {"prompt": question, "chosen": answer, "rejected": long_winded(answer)}


@dataclass(frozen=True, kw_only=True)
class Manual(Docstrings):
    """The docstrings of the standard library, and the topics of Python's `help()`."""

    def read(self) -> Iterator[str]:
        yield from super().read()
        yield from topics.topics.values()

    def size(self) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Answers(evals.Evaluator):
    """The most probable answers to unseen questions: the share that is right, and their mean length
    in words."""

    def evaluate(self, model, context):
        engine = generate.Engine(model.cast(), context=LENGTH)
        right, words = [], []
        for question in unseen():
            conversation = generate.Conversation(
                engine, context.data.tokenizer, sampling=generate.Sampling(temperature=0)
            )
            answer = conversation.say(question, max_tokens=64)
            right.append(answers()[question] in answer)
            words.append(len(answer.split()))
        results = []
        for name, values in (("right", right), ("words", words)):
            value, error = evals.ratio(np.array(values), np.ones(len(values)))
            fields = {"value": value, "stderr": error, "count": len(values)}
            results.append(evals.Result(step=context.step, name=f"unseen/{name}", **fields))
        return results


def pretrain() -> Experiment:
    """Learns English, as the documentation of Python has it."""
    return Experiment(
        name="pretrain",
        model=model.Config(
            vocab=VOCAB,
            dim=128,
            layers=3,
            attention=model.GQA(heads=2, kv_heads=1, head_dim=64, position=model.RoPE()),
            ffn=model.SwiGLU(hidden=352),
        ),
        data=Manual(),
        tokenizer=data.SentencePiece(vocab=VOCAB, split_scripts=False, symbols=data.CHAT_SYMBOLS),
        batch=data.BatchShape(sequences=8, length=LENGTH),
        objective=objectives.NextToken(),
        optimizer=optim.Muon(weight_decay=0.1, clip_norm=1.0),
        schedule=optim.WSD(peak=8e-3, warmup=0.05, decay=0.7, steps=500),
        evals=(evals.Perplexity(every=250),),
        save=checkpoint.Save(every=100),
        places={"single": Place(mesh=Mesh())},
        sample="Return the",
    )


def sft() -> Experiment:
    """Learns to answer questions."""
    return replace(
        pretrain(),
        name="sft",
        start=Stage("pretrain"),
        tokenizer=Stage("pretrain"),
        data=Questions(held_out=0.1),
        schedule=optim.WSD(peak=4e-3, warmup=0.05, decay=0.5, steps=300),
        evals=(evals.Perplexity(every=100), Answers(every=300)),
        sample=("What does os.path.join do?", "What is 3 + 5?", "Who are you?"),
    )


def dpo() -> Experiment:
    """Learns to prefer the concise answers."""
    return replace(
        sft(),
        name="dpo",
        start=Stage("sft"),
        data=Comparisons(held_out=0.1),
        batch=data.BatchShape(sequences=8, length=LENGTH, packing=data.Pairs()),
        objective=objectives.DPO(beta=0.5),
        # A learning rate of 3e-4 with beta=0.1 prefers the concise answers too, and spoils them.
        optimizer=optim.AdamW(clip_norm=1.0),
        schedule=optim.WSD(peak=1e-4, warmup=0.1, decay=0.5, steps=40),
        evals=(evals.Validation(every=10), Answers(every=40)),
    )


def experiment() -> Recipe:
    """A small assistant in three stages: pre-training, SFT, DPO."""
    return Recipe(name="tiny_chat", stages=(pretrain(), sft(), dpo()))


if __name__ == "__main__":
    main(experiment)
