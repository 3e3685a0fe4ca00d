"""Conversations have the tokens and the loss mask that TRL 1.16 gives them (tests/oracles).

TRL also trains the line break that a template writes after the end of the last message, if the
data has a prompt and a completion. Ours trains what a model must write, up to the end token. A
document of a pair ends with one more token, so that a model reads the last one of the answer.
"""

import json

import pytest
from oracles import tiny

from lm import data

MASKS = json.loads((tiny.RECORDED / "masks.json").read_text())
TEMPLATES = tuple(MASKS)


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(tiny.TOKENIZER)


def encoded(source, records, tokenizer, tmp_path):
    """The documents of these records: lists of ids and of weights."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = source(str(path))
    documents = source.encode(list(source.documents()), tokenizer)
    return [(each.ids.tolist(), each.weights.tolist()) for each in documents]


def expected(prompt, completion, weight, tokenizer, more=()):
    """The ids with `more`, and `weight` on the completion without a line break after its end."""
    breaks = completion[-1] == tokenizer.encode("\n")[0]
    weights = [0] * len(prompt) + [weight] * (len(completion) - breaks)
    ids = [*prompt, *completion, *more]
    return ids, weights + [0] * (len(ids) - len(weights))


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_message_of_the_assistant(name, marked, tokenizer, tmp_path):
    """TRL takes the mask from {% generation %} marks, which our templates need not have."""
    template, rows = MASKS[name]["template"], MASKS[name]["assistant"]
    template = template if marked else tiny.unmarked(template)
    ours = encoded(lambda path: data.Chat(path, template=template), rows, tokenizer, tmp_path)
    assert ours == [(row["ids"], [int(x != -100) for x in row["labels"]]) for row in rows]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_message_alone(name, tokenizer, tmp_path):
    template, rows = tiny.unmarked(MASKS[name]["template"]), MASKS[name]["completion"]
    ours = encoded(
        lambda path: data.Chat(path, template=template, train="last"), rows, tokenizer, tmp_path
    )
    firsts = [next(i for i, x in enumerate(row["labels"]) if x != -100) for row in rows]
    assert ours == [
        expected(row["ids"][:i], row["ids"][i:], 1, tokenizer) for row, i in zip(rows, firsts)
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_preference_pairs(name, tokenizer, tmp_path):
    template, rows = tiny.unmarked(MASKS[name]["template"]), MASKS[name]["pairs"]
    ours = encoded(
        lambda path: data.Preferences(path, template=template), rows, tokenizer, tmp_path
    )
    assert ours == [
        expected(row["prompt_ids"], row[f"{which}_ids"], 1, tokenizer, [tokenizer.eos])
        for row in rows
        for which in ("chosen", "rejected")
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_feedback(name, tokenizer, tmp_path):
    """Each prompt also gets the answer of another example: in TRL of the one before it in the
    batch, in ours of the one after it in the file."""
    template, rows = tiny.unmarked(MASKS[name]["template"]), MASKS[name]["feedback"]
    ours = encoded(lambda path: data.Feedback(path, template=template), rows, tokenizer, tmp_path)
    following = [*rows[1:], rows[0]]
    assert ours == [
        document
        for row, other in zip(rows, following)
        for each, weight in ((row, 2 - row["label"]), (other, 1))
        for document in [
            expected(row["prompt_ids"], each["completion_ids"], weight, tokenizer, [tokenizer.eos])
        ]
    ]
    cycled = [row["kl_completion_ids"] for row in following]
    assert cycled == [row["completion_ids"] for row in rows]
