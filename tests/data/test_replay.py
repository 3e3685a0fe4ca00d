"""Supervised fine-tuning on several weighted sources of conversations, with replay of text."""

from collections import Counter

import pytest
from chats import write
from made_up_corpus import documents

from lm import data

WEIGHTS = {"facts": 0.5, "talk": 0.25, "text": 0.25}


@pytest.fixture(scope="module")
def prepared(own_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    facts = [{"prompt": f"the tree {i}", "completion": f"light {i}"} for i in range(60)]
    turns = [("user", "a stone"), ("assistant", "river"), ("user", "and {}"), ("assistant", "one")]
    talk = [
        {"messages": [{"role": role, "content": text.format(i)} for role, text in turns]}
        for i in range(20)
    ]
    mixture = data.Mixture(
        sources={
            "facts": data.Chat(write(folder / "facts.jsonl", *facts), held_out=0.1),
            "talk": data.Chat(write(folder / "talk.jsonl", *talk), train="last", held_out=0.1),
            "text": data.Documents(documents(40), held_out=0.1),
        },
        weights=WEIGHTS,
    )
    return data.prepare(mixture, own_config, folder / "prepared")


def kind_of(text):
    if "<|end|>" not in text:
        return "text"
    return "facts" if text.startswith("<|user|>the tree") else "talk"


def test_sources_have_their_weights_and_their_own_loss(prepared):
    loader = prepared.loader(data.BatchShape(sequences=8, length=64), seed=0)
    decode = prepared.tokenizer.decode
    rows, used = Counter(), 0
    for step in range(10):
        batch = loader.batch(step)
        for tokens, targets, weights, segments, positions in zip(*batch):
            kinds = set()
            for segment in range(1, segments.max() + 1):
                inside = segments == segment
                assert positions[inside].tolist() == list(range(inside.sum()))
                kinds.add(kind := kind_of(decode(tokens[inside].tolist())))
                learned = decode(targets[inside & (weights > 0)].tolist())
                if kind == "text":
                    assert (weights[inside] == 1).all(), "text is learned as in pre-training"
                else:
                    assert learned == "one<|end|>" or learned.startswith("light ")
            assert len(kinds) == 1, "a sequence is of one source"
            rows.update(kinds)
            used += (segments > 0).sum()
    assert all(abs(rows[name] - 80 * weight) <= 1 for name, weight in WEIGHTS.items())
    assert used > 0.85 * 80 * 64, "conversations are packed"


def test_weights_may_change_at_a_step_without_preparing_again(prepared, own_config):
    scheduled = ((0, {"text": 1.0}), (4, {"facts": 1.0}))
    changed = data.Shards(str(prepared._folder), weights=scheduled)
    loader = data.prepare(changed, None, "unused").loader(
        data.BatchShape(sequences=2, length=64), seed=0
    )
    decode = prepared.tokenizer.decode
    kinds = [
        {kind_of(decode(row.tolist())) for row in loader.batch(step).tokens} for step in range(8)
    ]
    assert kinds == [{"text"}] * 4 + [{"facts"}] * 4
