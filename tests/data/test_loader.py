"""batch(step) depends only on the seed and the step."""

import collections
import dataclasses
import itertools
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import data
from lm.data import mixture
from lm.data import packing as packings
from lm.errors import UserError

SHAPE = data.BatchShape(sequences=8, length=32)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b))


def fingerprints(batch):
    return [row.tobytes() for row in batch.tokens]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstWindow(data.Packing):
    """Keeps only the first `length` tokens of each document, one per sequence."""

    def plan(self, stream, length):
        lengths = np.minimum(length, np.diff(stream.starts) - 1).astype(np.int32)
        return packings.Plan(stream.starts[:-1], lengths, np.arange(len(lengths) + 1))


@pytest.mark.parametrize("packing", [data.BestFit(), data.Concatenate(), FirstWindow()])
def test_batch_is_a_pure_function_of_step(prepared, packing):
    shape = data.BatchShape(sequences=8, length=32, packing=packing)
    loader, again = prepared.loader(shape, seed=3), prepared.loader(shape, seed=3)
    forward = [loader.batch(step) for step in range(6)]
    for step in reversed(range(6)):
        assert equal(again.batch(step), forward[step])
    assert not equal(prepared.loader(shape, seed=4).batch(0), forward[0])


def test_rows_equal_those_of_the_global_batch(prepared):
    loader = prepared.loader(SHAPE, seed=0)
    batch = loader.batch(5)
    # Holds for any number of hosts and any selection of rows.
    for hosts in (1, 2, 4, 8):
        parts = [loader.batch(5, slice(i, i + 8 // hosts)) for i in range(0, 8, 8 // hosts)]
        assert equal(batch, [np.concatenate(arrays) for arrays in zip(*parts)])
    assert equal([x[[6, 1]] for x in batch], loader.batch(5, [6, 1]))


def test_shapes_and_dtypes(prepared):
    batch = prepared.loader(SHAPE, seed=0).batch(0)
    assert {x.shape for x in batch} == {(8, 32)}
    assert [x.dtype.name for x in batch] == ["int32", "int32", "float32", "int32", "int32"]


def test_an_epoch_contains_each_sequence_once(tmp_path, tokenizer_config):
    from made_up_corpus import documents

    prepared = data.prepare(data.Documents(documents(40)), tokenizer_config, tmp_path)
    loader = prepared.loader(data.BatchShape(sequences=1, length=64), seed=1)
    (count,) = loader.sequences.values()
    epochs = [
        [fingerprints(loader.batch(step))[0] for step in range(e * count, (e + 1) * count)]
        for e in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    weights = sum(loader.batch(step).weights.sum() for step in range(count))
    assert weights == prepared.counts["documents", "train"].tokens


WEIGHTS = ((0, {"a": 0.5, "b": 0.3, "c": 0.2}), (700, {"a": 0.0, "b": 0.9, "c": 0.1}))
SEQUENCES = {"a": 50, "b": 7, "c": 1}


def first(count, weights, seed=0):
    stages = {name: [count] for name, count in SEQUENCES.items()}
    order = mixture.order(stages, mixture.phases(weights, SEQUENCES), lambda step: step, seed)
    return [order[index] for index in range(count)]


def test_source_proportions_hold_in_every_100_sequences():
    names = [name for name, _ in first(2_000, WEIGHTS)]
    for start, stop, table in ((0, 700, WEIGHTS[0][1]), (700, 2_000, WEIGHTS[1][1])):
        for index in range(start, stop - 100, 100):
            counts = collections.Counter(names[index : index + 100])
            # Sources are spread evenly: any 100 sequences are close to the exact fractions.
            assert all(abs(counts[name] - 100 * table[name]) <= 3 for name in table)


def test_sources_keep_their_position_when_weights_change():
    for name, size in SEQUENCES.items():
        numbers = [number for source, number in first(2_000, WEIGHTS) if source == name]
        for epoch in range(0, len(numbers), size):
            part = numbers[epoch : epoch + size]
            assert len(set(part)) == len(part)  # no repetition within an epoch


@pytest.mark.parametrize("count", [1, 2, 1_000, 66_000])
def test_epochs_are_different_permutations(count):
    order = mixture._shuffled([count], seed=5)
    epochs = [[order[e * count + i] for i in range(count)] for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 2
    assert count < 3 or epochs[0] != epochs[1]


@given(
    units=st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(sum),
    count=st.integers(0, 10**12),
)
def test_each_sequence_comes_from_one_source(units, count):
    before, after = mixture._shares(count, units), mixture._shares(count + 1, units)
    assert sum(before) == count
    assert sorted(b - a for a, b in zip(before, after)) == [0] * (len(units) - 1) + [1]
    assert all(unit or not share for unit, share in zip(units, before))
    exact = [count * unit / sum(units) for unit in units]
    assert all(abs(a - b) <= len(units) + 1e-3 for a, b in zip(before, exact))


def test_different_seeds_have_different_epochs():
    one, two = first(100, {"a": 1.0}, seed=0), first(50, {"a": 1.0}, seed=1)
    assert two not in (one[:50], one[50:])


def test_default_weights_are_token_counts(tmp_path, tokenizer_config):
    from made_up_corpus import documents

    both = data.Mixture(
        sources={"big": data.Documents(documents(60)), "small": data.Documents(documents(30, 7))}
    )
    prepared = data.prepare(both, tokenizer_config, tmp_path)
    tokens = {name: prepared.counts[name, "train"].tokens for name in prepared.names}
    size = {name: prepared.counts[name, "train"].bytes for name in prepared.names}
    loader = prepared.loader(SHAPE, seed=0)
    assert loader.bytes_per_token == pytest.approx(sum(size.values()) / sum(tokens.values()))


def test_invalid_weights_are_errors():
    a = {"a": data.Documents(("x",))}
    for weights, words in (
        ({"b": 1.0}, "data.weights='b' is not known"),
        ({"a": -1.0}, "data.weights.a=-1.0 must be zero or above"),
        ({"a": 0.0}, "must have a weight above zero"),
        (((5, {"a": 1.0}),), "must begin at step 0"),
        (((0, {"a": 1.0}), (0, {"a": 1.0})), "must begin at step 0 and rise"),
    ):
        with pytest.raises(UserError, match=words.replace("(", r"\(")):
            data.Mixture(sources=a, weights=weights)
    with pytest.raises(UserError, match="is empty"):
        data.Mixture(sources={})


RAMPS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9)), max_size=3).map(
    lambda steps: tuple(itertools.accumulate(steps, lambda a, b: (a[0] + b[0], a[1] + b[1])))
)


@given(ramp=RAMPS, tokens=st.integers(0, 50_000), length=st.sampled_from([1, 7, 64]))
def test_token_counts_of_a_batch_ramp(ramp, tokens, length):
    shape = data.BatchShape(sequences=40, length=length, ramp=ramp)
    before = [0, *itertools.accumulate(shape.sequences_at(step) * length for step in range(200))]
    assert [shape.tokens_before(step) for step in range(201)] == before
    steps = shape.steps_for(tokens)
    assert shape.tokens_before(steps) >= tokens
    assert steps == 0 or shape.tokens_before(steps - 1) < tokens


def test_a_batch_ramp_does_not_change_the_data_order(prepared):
    ramped = data.BatchShape(sequences=8, length=32, ramp=((2, 2), (3, 4)))
    assert [ramped.sequences_at(step) for step in range(5)] == [2, 2, 4, 8, 8]
    a, b = prepared.loader(ramped, seed=0), prepared.loader(SHAPE, seed=0)
    joined = np.concatenate([a.batch(step).tokens for step in range(4)])
    assert np.array_equal(joined, np.concatenate([b.batch(0).tokens, b.batch(1).tokens]))


def test_invalid_batch_shapes_are_errors():
    for fields in (
        {"sequences": 0, "length": 4},
        {"sequences": 8, "length": 4, "ramp": ((5, 4), (3, 6))},
        {"sequences": 8, "length": 4, "ramp": ((5, 8),)},
    ):
        with pytest.raises(UserError, match=r"batch\."):
            data.BatchShape(**fields)


def test_prefetch_keeps_the_order_and_runs_ahead():
    called = []
    done = threading.Event()

    def work(step):
        called.append(step)
        if step == 2:
            done.set()
        return step * step

    with data.prefetch(work, 0, 5, depth=3) as values:
        assert done.wait(10)  # before the first value is requested
        assert list(values) == [0, 1, 4, 9, 16]
    assert called == [0, 1, 2, 3, 4]


def test_prefetch_raises_the_error_when_its_value_is_requested():
    def work(step):
        if step == 2:
            raise RuntimeError("step 2")
        return step

    with data.prefetch(work, 0) as values:
        assert [next(values), next(values)] == [0, 1]
        with pytest.raises(RuntimeError, match="step 2"):
            next(values)


def test_prefetch_stops_its_thread():
    before = threading.active_count()
    with data.prefetch(lambda step: step, 0) as values:
        next(values)
    assert threading.active_count() == before
    assert list(values) == []
