"""Preference pairs are read from the common shapes, and give two documents each: the same prompt
with either answer, and the loss on the answer. Labelled answers give two as well."""

import json

import numpy as np
import pytest
from chats import trained, write

from lm import data
from lm.errors import UserError

HELLO = {"role": "user", "content": "a stone"}
DEEP = {"role": "assistant", "content": "the river"}
MORE = {"role": "user", "content": "and light"}
GOOD = {"role": "assistant", "content": "one tree"}
BAD = {"role": "assistant", "content": "two"}
TURNS = [HELLO, DEEP, MORE]
ONE = "<|user|>a stone<|end|><|assistant|>"
THREE = f"{ONE}the river<|end|><|user|>and light<|end|><|assistant|>"
SHAPES = {
    "text": ({"prompt": "a stone", "chosen": "one tree", "rejected": "two"}, ONE),
    "question": ({"question": "a stone", "chosen": "one tree", "rejected": "two"}, ONE),
    "Alpaca": (
        {"instruction": "a", "input": "stone", "output": "x", "chosen": "one tree"}
        | {"rejected": "two"},
        "<|user|>a\n\nstone<|end|><|assistant|>",
    ),
    "system beside it": (
        {"system": "be kind", "question": "a stone", "chosen": "one tree", "rejected": "two"},
        f"<|system|>be kind<|end|>{ONE}",
    ),
    "messages": ({"prompt": TURNS, "chosen": [GOOD], "rejected": [BAD]}, THREE),
    "an implicit prompt": ({"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, THREE),
    "whole conversations beside the prompt": (
        {"prompt": "a stone", "chosen": [HELLO, GOOD], "rejected": [HELLO, BAD]},
        ONE,
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "a stone"}]}
        | {"chosen": {"from": "gpt", "value": "one tree"}}
        | {"rejected": {"from": "gpt", "value": "two"}},
        ONE,
    ),
    "HH-RLHF": (
        {
            name: "\n\nHuman: a stone\n\nAssistant: the river\n\nHuman: and light"
            f"\n\nAssistant: {answer}"
            for name, answer in (("chosen", "one tree"), ("rejected", "two"))
        },
        THREE,
    ),
    "HH-RLHF with a prompt": (
        {"prompt": "\n\nHuman: a stone\n\nAssistant:", "chosen": " one tree", "rejected": " two"},
        ONE,
    ),
}


def encoded(source, tokenizer):
    return source.encode(list(source.documents()), tokenizer)


@pytest.mark.parametrize("name", SHAPES)
def test_a_pair_is_the_prompt_with_either_answer(name, own, tmp_path):
    record, prompt = SHAPES[name]
    documents = encoded(data.Preferences(write(tmp_path / "x.jsonl", record)), own)
    assert [own.decode(each.ids.tolist()) for each in documents] == [
        f"{prompt}one tree<|end|>",
        f"{prompt}two<|end|>",
    ]
    answers = [trained(own, each.ids, each.weights) for each in documents]
    assert answers == [["one tree<|end|>"], ["two<|end|>"]]
    begins = [each.ids[: int(np.argmax(each.weights))].tolist() for each in documents]
    assert begins[0] == begins[1], "the tokens of the prompt are the same"
    (chat,) = encoded(data.Chat(write(tmp_path / "y.jsonl", {**record, "rejected": ""})), own)
    assert chat.ids.tolist() == documents[0].ids[:-1].tolist(), "Chat learns the chosen answer"
    for each in documents:  # so that the model reads the last token of the conversation
        assert (each.ids[-1], each.weights[-1]) == (own.eos, 0)


def test_a_system_message_is_added_to_pairs_without_one(own, tmp_path):
    records = [SHAPES["text"][0], SHAPES["system beside it"][0]]
    source = data.Preferences(write(tmp_path / "x.jsonl", *records), system="be brief")
    texts = [own.decode(each.ids.tolist()) for each in encoded(source, own)]
    assert [text[:20] for text in texts] == ["<|system|>be brief<|"] * 2 + [
        "<|system|>be kind<|e"
    ] * 2


FAULTS = {
    "equal chosen and rejected answers": {"prompt": "a", "chosen": "b", "rejected": " b "},
    "an empty message of the assistant": {"prompt": "a", "chosen": " ", "rejected": "b"},
    "two messages of the same role in a row": {"chosen": [GOOD, GOOD], "prompt": [HELLO]}
    | {"rejected": [BAD]},
    "two conversations that differ before": {"chosen": [HELLO, GOOD], "rejected": [*TURNS, BAD]},
    "does not end with an answer": {"chosen": [HELLO, GOOD, MORE], "rejected": [HELLO, BAD]},
    "begins with the assistant": {"chosen": [DEEP, MORE, GOOD], "rejected": [DEEP, MORE, BAD]},
    "is a conversation without messages": {"chosen": [], "rejected": []},
    "has a system message that is not the first": {"rejected": [HELLO, BAD]}
    | {"chosen": [HELLO, {"role": "system", "content": "x"}, GOOD]},
}


def test_pairs_that_cannot_be_trained_on_are_left_out_counted_and_named(own, tmp_path, capsys):
    good = SHAPES["text"][0]
    twice = FAULTS["equal chosen and rejected answers"]
    path = write(tmp_path / "x.jsonl", good, *FAULTS.values(), good, twice)
    source = data.Preferences(path)
    assert len(list(source.documents())) == len(list(source.documents())) == 2
    (line,) = capsys.readouterr().err.splitlines()  # once, although it was read twice
    assert line.startswith(f"{path}: left out 9 of 11 records: 2 like line 2, which has equal ")
    for number, fault in enumerate(FAULTS, start=2):
        assert f"like line {number}, which " in line and fault in line
    with pytest.raises(UserError, match=r"line 2 has equal .*; mend it, or set data\.bad_records"):
        list(data.Preferences(path, bad_records="error").documents())
    with pytest.raises(UserError, match=r"none of 1 records can be trained on: 1 like line 1, wh"):
        list(data.Preferences(write(tmp_path / "y.jsonl", twice)).documents())


@pytest.mark.parametrize(
    "record, words",
    [
        ({"prompt": "a", "chosen": "b"}, "needs chosen and rejected. Its fields: prompt, chosen"),
        ({"chosen": "b", "rejected": "c"}, "an answer without a prompt; add the field prompt"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "int, not text"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "must be a list of objects"),
        ({"prompt": "a", "chosen": {"role": "robot", "content": "b"}, "rejected": "c"}, "'robot'"),
        ({"prompt": "a", "chosen": [{"role": []}], "rejected": "c"}, "no 'content'"),
    ],
)
def test_what_is_no_pair_is_refused_with_file_and_line(record, words, tmp_path):
    path = write(tmp_path / "x.jsonl", SHAPES["text"][0], record)
    with pytest.raises(UserError, match=rf"x\.jsonl, line 2.*{words}"):
        list(data.Preferences(path).documents())


def test_pairs_that_the_template_refuses_are_counted_and_named(own, tmp_path, capsys):
    records = [{"prompt": f"{word} x", "chosen": "b", "rejected": "c"} for word in "abcb"]
    template = "{% if messages[0].content == 'b x' %}{{ raise_exception('no b') }}{% endif %}"
    source = data.Preferences(
        write(tmp_path / "x.jsonl", *records),
        template=template + "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    assert len(encoded(source, own)) == 4
    assert capsys.readouterr().err == (
        "preferences: left out 2 of 4 records that the chat template refuses, like this one: the "
        "conversation that begins 'b x': The chat template refuses this conversation: no b.\n"
    )


def test_both_documents_of_a_pair_are_on_the_same_side(own_config, tmp_path):
    records = [
        {"prompt": f"the {i}", "chosen": f"light {i}", "rejected": f"value {i}"} for i in range(80)
    ]
    source = data.Preferences(write(tmp_path / "x.jsonl", *records), held_out=0.2)
    prepared = data.prepare(source, own_config, tmp_path / "prepared")
    numbers = {}
    for side in ("train", "held_out"):
        texts = list(prepared.texts("preferences", side))
        numbers[side] = [text.split("the ")[1].split("<")[0] for text in texts[::2]]
        for number, chosen, rejected in zip(numbers[side], texts[::2], texts[1::2], strict=True):
            assert chosen.endswith(f"the {number}<|end|><|assistant|>light {number}<|end|>")
            assert rejected.endswith(f"the {number}<|end|><|assistant|>value {number}<|end|>")
    assert 5 < len(numbers["held_out"]) < 35  # 16 plus or minus about three standard deviations
    assert sorted(numbers["train"] + numbers["held_out"]) == sorted(map(str, range(80)))


def test_labelled_answers_have_weights_and_the_answer_of_the_next(own, tmp_path):
    records = [
        {"prompt": "a", "completion": "light", "label": True},
        {"prompt": "b", "completion": "tree", "label": False},
        {"messages": [*TURNS, GOOD], "label": False},
    ]
    documents = encoded(data.Feedback(write(tmp_path / "x.jsonl", *records)), own)
    answers = [trained(own, each.ids, each.weights)[0] for each in documents]
    assert answers == [
        f"{answer}<|end|>" for answer in ("light", "tree", "tree", "one tree", "one tree", "light")
    ]
    assert [each.weights.max() for each in documents] == [1, 1, 2, 1, 2, 1]
    assert all(each.losses == np.count_nonzero(each.weights) for each in documents)
    texts = [own.decode(each.ids.tolist()) for each in documents]
    prompts = [text[: text.rindex("<|assistant|>")] for text in texts]
    assert prompts[::2] == prompts[1::2] and len(set(prompts)) == 3


@pytest.mark.parametrize(
    "records, words",
    [
        ([{"prompt": "a", "completion": "b"}], "label that is true or false; its fields: prompt"),
        ([{"prompt": "a", "completion": "b", "label": 1}], "label that is true or false; it is 1"),
        ([{"prompt": "a", "completion": "b", "label": True}], "has a single example"),
        ([{"messages": TURNS, "label": True}], "none of 1 records.*does not end with an answer"),
    ],
)
def test_bad_feedback_is_one_sentence(records, words, tmp_path):
    with pytest.raises(UserError, match=words):
        list(data.Feedback(write(tmp_path / "x.jsonl", *records)).documents())


def test_prepared_feedback_has_weights_of_two(own_config, tmp_path):
    records = [
        {"prompt": f"the {i}", "completion": f"light {i}", "label": i % 2 == 0} for i in range(30)
    ]
    source = data.Feedback(write(tmp_path / "x.jsonl", *records), held_out=0)
    prepared = data.prepare(source, own_config, tmp_path / "prepared")
    batch = prepared.loader(
        data.BatchShape(sequences=4, length=64, packing=data.Pairs()), seed=0
    ).batch(0)
    seen = set()
    for row in range(4):
        for segment in range(1, batch.segments[row].max() + 1):
            weights = batch.weights[row][batch.segments[row] == segment]
            seen.add((segment % 2, *sorted(set(weights.tolist()))))
    assert seen == {(1, 0.0, 1.0), (1, 0.0, 2.0), (0, 0.0, 1.0)}
    counts = prepared.counts["feedback", "train"]
    assert counts.tokens == prepared.stream("feedback", "train").losses_d.sum()


def test_json_lists_are_read(own, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([SHAPES["text"][0]] * 3))
    assert len(encoded(data.Preferences(str(tmp_path / "x.json")), own)) == 6
