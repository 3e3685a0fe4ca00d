"""A curriculum: the first epoch goes from easy to hard, later ones are shuffled."""

import itertools

import numpy as np
import pytest
from chats import write
from made_up_corpus import documents
from test_pairs_packing import PAIRS

from lm import data
from lm.data import mixture, packing
from lm.errors import UserError

CHATS = [
    {
        "messages": [
            {"role": role, "content": f"{i} the stone"}
            for _ in range(1 + i % 3)
            for role in ("user", "assistant")
        ],
        "level": (i * 37 % 60) / 10 - 2,
    }
    for i in range(60)
]


def prepare(source, config, folder):
    return data.prepare(data.Mixture(sources={"x": source}), config, folder)


def rows_of_epoch(loader, number, epoch=0):
    """The documents of each sequence, as their tokens, in the order of training."""
    first = epoch * number
    rows = []
    for sequence in range(first, first + number):
        batch = loader.batch(sequence)
        rows.append(
            [
                tuple(batch.targets[0][batch.segments[0] == s].tolist())
                for s in range(1, batch.segments[0].max() + 1)
            ]
        )
    return rows


def key_of(by, tokenizer):
    levels = {record["messages"][0]["content"]: record["level"] for record in CHATS}

    def key(tokens):
        text = tokenizer.decode(list(tokens))
        content = text.split("<|user|>")[1].split("<|end|>")[0]
        return {
            "length": len(tokens),
            "turns": text.count("<|assistant|>"),
            "level": levels[content],
        }[by]

    return key


@pytest.mark.parametrize("by", ["length", "turns", "level"])
def test_the_first_epoch_goes_from_easy_to_hard(by, own_config, tmp_path):
    source = data.Chat(write(tmp_path / "x.jsonl", *CHATS), curriculum=by, held_out=0)
    prepared = prepare(source, own_config, tmp_path / "prepared")
    shape = data.BatchShape(sequences=1, length=80)
    loader = prepared.loader(shape, seed=3)
    number, key = loader.sequences["x"], key_of(by, prepared.tokenizer)
    assert number >= packing.STAGES
    first, second = (
        [[key(each) for each in row] for row in rows_of_epoch(loader, number, epoch)]
        for epoch in range(2)
    )
    flat = sorted(itertools.chain.from_iterable(first))
    assert flat == sorted(itertools.chain.from_iterable(second)), "the same documents"
    stage = len(flat) // packing.STAGES
    seen = 0
    for row in first:
        # Each sequence has documents of one stage, of `stage` documents in the order of their keys.
        begin = seen // stage * stage
        allowed = flat[begin : begin + stage]
        assert min(allowed) <= min(row) and max(row) <= max(allowed)
        seen += len(row)
    assert [max(row) for row in first] != [max(row) for row in second]
    assert max(max(row) for row in second[: number // 4]) > max(
        max(row) for row in first[: number // 4]
    )
    again = prepared.loader(shape, seed=3)
    for step in (number + 1, 2, number - 1, 0):
        for a, b in zip(again.batch(step), loader.batch(step)):
            np.testing.assert_array_equal(a, b)


def test_pairs_follow_a_curriculum_whole(own_config, tmp_path):
    source = data.Preferences(write(tmp_path / "x.jsonl", *PAIRS), curriculum="length", held_out=0)
    prepared = prepare(source, own_config, tmp_path / "prepared")
    loader = prepared.loader(data.BatchShape(sequences=1, length=100, packing=data.Pairs()), seed=0)
    rows = rows_of_epoch(loader, loader.sequences["x"])
    (end,) = prepared.tokenizer.encode("<|end|>")
    prompts = [[tokens[: tokens.index(end)] for tokens in row] for row in rows]
    for row in prompts:
        assert row[::2] == row[1::2]
    lengths = [max(len(a) + len(b) for a, b in zip(row[::2], row[1::2])) for row in rows]
    middle = len(lengths) // 2
    assert max(lengths[: middle // 2]) <= min(lengths[middle:])


def test_other_sources_of_a_mixture_stay_shuffled(own_config, tmp_path):
    texts = data.Documents(documents(40), held_out=0)
    chats = data.Chat(write(tmp_path / "x.jsonl", *CHATS), curriculum="length", held_out=0)
    both = data.Mixture(sources={"chat": chats, "text": texts}, weights={"chat": 1, "text": 1})
    prepared = data.prepare(both, own_config, tmp_path / "prepared")
    assert prepared.stream("text", "train").keys_d is None
    alone = data.prepare(
        data.Mixture(sources={"text": texts}), own_config, tmp_path / "alone"
    ).loader(data.BatchShape(sequences=1, length=80), seed=0)
    loader = prepared.loader(data.BatchShape(sequences=2, length=80), seed=0)
    (end,) = prepared.tokenizer.encode("<|end|>")
    texts = [row for step in range(6) for row in loader.batch(step).tokens if end not in row]
    np.testing.assert_array_equal(texts, [alone.batch(step).tokens[0] for step in range(6)])


def test_stages_are_permuted_within_the_first_epoch_only():
    stages = [5, 0, 3, 4]
    order = mixture._shuffled(stages, seed=1)
    first, second = ([order[e * 12 + i] for i in range(12)] for e in range(2))
    assert sorted(first[:5]) == [0, 1, 2, 3, 4] and sorted(first[5:8]) == [5, 6, 7]
    assert sorted(first[8:]) == [8, 9, 10, 11] and sorted(second) == list(range(12))
    assert first != sorted(first) and sorted(second[:5]) != [0, 1, 2, 3, 4]


def test_concatenation_and_bad_fields_are_refused(own_config, tmp_path):
    path = write(tmp_path / "x.jsonl", *CHATS)
    prepared = prepare(
        data.Chat(path, curriculum="turns", held_out=0), own_config, tmp_path / "prepared"
    )
    shape = data.BatchShape(sequences=1, length=50, packing=data.Concatenate())
    with pytest.raises(UserError, match=r"Concatenate\(\) joins documents, which a curriculum"):
        prepared.loader(shape, seed=0)
    with pytest.raises(UserError, match=r"data\.curriculum='levle' .* Did you mean 'level'\?"):
        list(data.Chat(path, curriculum="levle").documents())
    for value in ("hard", None, True, float("nan")):
        bad = write(tmp_path / "bad.jsonl", {**CHATS[0], "level": value})
        with pytest.raises(UserError, match=r"line 1: field 'level' .* holds .*, not a number"):
            list(data.Chat(bad, curriculum="level").documents())
