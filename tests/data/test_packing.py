"""Each token is predicted exactly once, and only from its own document."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import packing
from lm.data.packing import BestFit, Concatenate
from lm.data.stream import Stream

BOS, EOS = 1, 2


def make_stream(sizes, shards=1):
    """Returns documents of these sizes in `shards` shards, with all tokens distinct."""
    documents, next_token = [], 10
    for size in sizes:
        body = np.arange(next_token, next_token + size)
        documents.append(np.concatenate([[BOS], body, [EOS]]).astype(np.uint32))
        next_token += size
    parts = [p for p in np.array_split(np.arange(len(sizes)), shards) if len(p)]
    tokens = [np.concatenate([documents[d] for d in part]) for part in parts]
    lengths = [np.array([(len(documents[d]), 1) for d in part], np.uint32) for part in parts]
    return Stream(lengths, lambda index: tokens[index]), documents


def all_rows(stream, plan, length):
    batch = packing.empty(plan.sequences, length)
    for row in range(plan.sequences):
        packing.fill(batch, row, stream, plan, row)
    return batch


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(deadline=None)
@given(sizes=SIZES, length=st.integers(1, 17), shards=st.integers(1, 4))
def test_best_fit_predicts_each_token_once(sizes, length, shards):
    stream, documents = make_stream(sizes, shards)
    batch = all_rows(stream, BestFit().plan(stream, length), length)
    follows = {int(a): int(b) for d in documents for a, b in pairwise(d[1:])}
    predicted = []
    for tokens, targets, weights, segments, positions in zip(*batch):
        assert (np.diff(segments[segments > 0]) >= 0).all()  # 1, 1, 2, 2, 2, ... then padding
        assert ((segments > 0) == (weights == 1)).all()
        assert not tokens[segments == 0].any()
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            inputs, outputs = tokens[inside].tolist(), targets[inside].tolist()
            assert (positions[inside] == np.arange(inside.sum())).all()
            assert outputs[:-1] == inputs[1:]
            assert all(follows[a] == b for a, b in zip(inputs, outputs) if a != BOS)
            predicted += outputs
    everything = [token for document in documents for token in document[1:].tolist()]
    assert sorted(predicted) == sorted(everything)


@settings(deadline=None)
@given(sizes=SIZES, length=st.integers(1, 17), shards=st.integers(1, 4))
def test_concatenate_predicts_each_token_except_bos(sizes, length, shards):
    stream, documents = make_stream(sizes, shards)
    batch = all_rows(stream, Concatenate().plan(stream, length), length)
    everything = np.concatenate(documents)
    used = batch.segments.ravel() > 0
    assert (batch.tokens.ravel()[used] == everything[:-1]).all()
    assert (batch.targets.ravel()[used] == everything[1:]).all()
    assert set(batch.segments.ravel()) <= {0, 1}
    assert (batch.positions[0] == np.arange(length))[batch.segments[0] > 0].all()
    # All targets except BOS tokens contribute to the loss.
    assert (batch.weights.ravel()[used] == (everything[1:] != BOS)).all()
    assert not batch.weights.ravel()[~used].any()


def reference_best_fit(lengths, capacity):
    """Best-fit decreasing, one chunk at a time. Returns the free space per sequence, sorted."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, index) for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=80))
def test_best_fit_equals_the_reference(lengths):
    sequences = packing._best_fit(np.array(lengths), 20)
    used = np.bincount(sequences, weights=lengths)
    assert sorted(20 - used) == reference_best_fit(lengths, 20)


def test_one_million_chunks_fill_99_percent_of_the_sequences():
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.lognormal(6, 1.2, 1_000_000), 4096).astype(int) + 1
    lengths = np.minimum(lengths, 4096)
    sequences = packing._best_fit(lengths, 4096)
    used = np.bincount(sequences, weights=lengths)
    assert used.max() <= 4096
    assert used.mean() > 0.99 * 4096


@pytest.mark.parametrize("kind", [BestFit(), Concatenate()])
def test_plans_are_deterministic(kind):
    stream, _ = make_stream([3, 9, 30, 1, 1, 7] * 5)
    a, b = (kind.plan(stream, 8) for _ in range(2))
    assert all((x == y).all() for x, y in zip(vars(a).values(), vars(b).values()))
