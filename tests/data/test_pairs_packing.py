"""Pairs of documents stay together in a sequence, whole."""

import numpy as np
import pytest
from chats import write
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_corpus import documents
from test_packing import all_rows, make_stream

from lm import data
from lm.errors import UserError

PAIRS = [
    {"prompt": f"a stone {i}", "chosen": "the river " * (1 + i % 7), "rejected": "light"}
    for i in range(60)
]


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30),
    length=st.integers(8, 40),
)
def test_each_pair_that_fits_is_whole_and_once(sizes, length):
    stream, texts = make_stream([size for pair in sizes for size in pair])
    plan = data.Pairs().plan(stream, length)
    batch = all_rows(stream, plan, length)
    found = []
    for tokens, targets, weights, segments, positions in zip(*batch):
        assert segments.max() % 2 == 0
        for first in range(1, segments.max(), 2):
            pair = []
            for segment in (first, first + 1):
                inside = segments == segment
                assert (positions[inside] == np.arange(inside.sum())).all()
                assert (weights[inside] == 1).all()
                pair.append((*tokens[inside].tolist(), int(targets[inside][-1])))
            found.append(tuple(pair))
    pairs = list(zip(texts[::2], texts[1::2]))
    fitting = [[tuple(x.tolist()) for x in p] for p in pairs if sum(map(len, p)) - 2 <= length]
    assert sorted(found) == sorted(map(tuple, fitting))
    left_out = [
        d
        for p, (a, b) in enumerate(pairs)
        for d in (2 * p, 2 * p + 1)
        if len(a) + len(b) - 2 > length
    ]
    assert sorted(plan.left_out) == left_out


def test_pairs_fill_99_percent_of_the_sequences():
    draw = np.random.default_rng(0)
    sizes = np.minimum(draw.lognormal(4, 0.8, 20_000), 400).astype(int) + 1
    stream, _ = make_stream(sizes)
    plan = data.Pairs().plan(stream, 1024)
    assert plan.lengths.sum() > 0.99 * 1024 * plan.sequences


@pytest.fixture(scope="module")
def prepared(own_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    source = data.Preferences(write(folder / "x.jsonl", *PAIRS), held_out=0.2)
    return data.prepare(source, own_config, folder / "prepared")


def shape(length, kind=None, sequences=4):
    return data.BatchShape(sequences=sequences, length=length, packing=kind or data.Pairs())


def test_a_batch_has_whole_pairs(prepared):
    loader = prepared.loader(shape(100), seed=0)
    tokenizer = prepared.tokenizer
    for step in range(4):
        batch = loader.batch(step)
        for row in range(4):
            for segment in range(1, batch.segments[row].max() + 1):
                inside = batch.segments[row] == segment
                targets, weights = batch.targets[row][inside], batch.weights[row][inside]
                answer = tokenizer.decode(targets[weights > 0].tolist())
                assert answer.endswith("<|end|>")
                assert answer.startswith("the river" if segment % 2 else "light")


def test_pairs_longer_than_a_sequence_are_counted_and_named(prepared, capsys):
    loader = prepared.loader(shape(50), seed=0)
    (line,) = capsys.readouterr().err.splitlines()
    stream = prepared.stream("preferences", "train")
    lengths = (np.diff(stream.starts) - 1).reshape(-1, 2).sum(axis=1)
    long = int((lengths > 50).sum())
    assert 0 < long < len(lengths)
    span = stream.starts[2 * int(np.argmax(lengths > 50)) :][:2]
    text = prepared.tokenizer.decode(stream.read(*span).tolist())
    assert line.startswith(
        f"preferences: {long} of {len(lengths)} pairs are longer than batch.length=50 and left "
        f"out; the first begins '{text[:20]}"
    )
    assert line.endswith(f"batch.length={lengths.max()} holds all of them.")
    prepared.loader(shape(int(lengths.max())), seed=0)
    assert not capsys.readouterr().err, "then nothing is left out"
    batches = [loader.batch(step) for step in range(loader.sequences["preferences"] // 4 + 1)]
    assert all((batch.segments.max(axis=1) % 2 == 0).all() for batch in batches)
    with pytest.raises(UserError, match=r"batch\.length=4 is too short: no pair fits"):
        prepared.loader(shape(4), seed=0)


def test_the_packing_must_be_of_the_kind_of_source(prepared, own_config, tmp_path):
    with pytest.raises(UserError, match=r"'preferences' gives pairs .* batch\.packing=data\.Pairs"):
        prepared.loader(shape(100, data.BestFit()), seed=0)
    texts = data.prepare(data.Documents(documents(30)), own_config, tmp_path)
    with pytest.raises(UserError, match=r"Pairs\(\) needs pairs .* source 'documents' does not"):
        texts.loader(shape(100), seed=0)


def test_held_out_pairs_are_evaluated_as_pairs(prepared, own, tmp_path):
    evaluation = prepared.evaluation("preferences", 100, 2)
    seen = []
    for batch, documents_bt in evaluation:
        for row in range(2):
            for segment in range(1, batch.segments[row].max() + 1):
                (document,) = set(documents_bt[row][batch.segments[row] == segment].tolist())
                assert document % 2 == (segment + 1) % 2
                seen.append(document)
    assert sorted(seen) == list(range(prepared.counts["preferences", "held_out"].documents))
    source = data.Preferences(write(tmp_path / "x.jsonl", *PAIRS))
    (batch, _), *_ = data.evaluation(source, own, 100, 2)
    assert (batch.segments.max(axis=1) % 2 == 0).all()
