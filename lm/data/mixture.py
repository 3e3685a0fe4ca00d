"""Several sources in one stream of sequences, by weights that may change at a step."""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import grain
import numpy as np

from lm.data.sources import AnySource
from lm.errors import UserError, check_name

# Weights as a declaration writes them: one table, or ((step, table), ...) from step 0 on.
Weights = dict[str, float] | tuple[tuple[int, dict[str, float]], ...]
# The same, always as phases that name each source.
Phases = tuple[tuple[int, dict[str, float]], ...]

_SMALL = 1 << 16  # elements: fewer are permuted in memory
_UNITS = 1 << 32  # weights are rounded to this fraction of their sum


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Named sources, and the share of sequences that each gives: `weights={"web": 0.8, "code":
    0.2}`, or from which step on which, `weights=((0, {...}), (1000, {...}))`. Without weights each
    source counts by its tokens."""

    sources: dict[str, AnySource]
    weights: dict[str, float] | tuple[tuple[int, dict[str, float]], ...] = ()

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError(
                "data.sources={} is empty; name a source, as in {'web': data.Text(...)}."
            )
        for name in self.sources:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise UserError(f"data.sources: {name!r} must be letters, digits, '_' and '-'.")
        if self.weights:
            phases(self.weights, dict.fromkeys(self.sources, 1))


def phases(weights: Weights, tokens: Mapping[str, int]) -> Phases:
    """`weights` as phases that name each source; by `tokens` of each where none are given. Raises
    UserError for bad ones."""
    if not weights:
        weights = {name: float(count) for name, count in tokens.items()}
    steps = ((0, weights),) if isinstance(weights, Mapping) else tuple(weights)
    if steps[0][0] != 0 or any(b[0] <= a[0] for a, b in pairwise(steps)):
        raise UserError(
            f"data.weights must begin at step 0 and rise, and not be {[s for s, _ in steps]}."
        )
    for _, table in steps:
        for name, weight in table.items():
            check_name("data.weights", name, tokens)
            if weight < 0:
                raise UserError(f"data.weights.{name}={weight!r} must not be below zero.")
        if not sum(table.values()) > 0:
            raise UserError(f"data.weights={table!r} must hold a weight above zero.")
    return tuple((step, {name: t.get(name, 0.0) for name in tokens}) for step, t in steps)


def order(
    sequences: Mapping[str, int], weights: Phases, sequences_before: Callable[[int], int], seed: int
) -> grain.MapDataset:
    """Which sequence comes when: an endless dataset of (source name, sequence number).

    Each source is gone through in a shuffled order of its own, another one in every epoch. Where
    the weights change, at the global sequence `sequences_before(step)`, each source continues where
    it was.
    """
    names = list(sequences)
    datasets = [
        _shuffled(sequences[name], _seed_of(seed, name)).map(
            lambda number, name=name: (name, number)
        )
        for name in names
    ]
    starts = [sequences_before(step) for step, _ in weights]
    turns = _Turns(starts, [[table[name] for name in names] for _, table in weights])
    return grain.MapDataset.select_from_datasets(datasets, turns)


def _shuffled(count: int, seed: int) -> grain.MapDataset:
    """0 .. count - 1 in another order in every epoch, without end."""
    if count >= _SMALL:
        return grain.MapDataset.range(count).shuffle(seed=seed).repeat()
    return grain.MapDataset.source(_Permutations(count, seed))


class _Permutations:
    """What Grain's shuffle does, for few elements. That one draws from 65,536 places until it hits
    an element, which takes 20 ms for the elements of a list of two."""

    def __init__(self, count: int, seed: int):
        self._count = count
        self._epoch = lru_cache(2)(lambda epoch: _permutation(count, seed, epoch))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, self._count)
        return int(self._epoch(epoch)[place])


def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState is frozen: later versions of NumPy give the same numbers.
    return np.random.RandomState(_seed_of(seed, str(epoch))).permutation(count)


class _Turns(grain.transforms.DatasetSelectionMap):
    """Whose turn it is: index -> (source, index within the source), without a record of what came
    before."""

    def __init__(self, starts: Sequence[int], weights: Sequence[Sequence[float]]):
        self._phases = []
        given = [0] * len(weights[0])  # by each source until the phase starts
        for number, (start, row) in enumerate(zip(starts, weights)):
            units = [round(weight / sum(row) * _UNITS) for weight in row]
            self._phases.append((start, units, given))
            if number + 1 < len(starts):
                more = _shares(starts[number + 1] - start, units)
                given = [a + b for a, b in zip(given, more)]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        start, units, given = next(p for p in reversed(self._phases) if p[0] <= index)
        before = _shares(index - start, units)
        after = _shares(index - start + 1, units)
        source = next(i for i, (a, b) in enumerate(zip(before, after)) if b > a)
        return source, given[source] + before[source]


def _shares(count: int, units: Sequence[int]) -> list[int]:
    """How many of the first `count` turns go to each source. Each source takes its share of what
    the earlier ones left, rounded up; all shares grow monotonically with `count` and sum to it, so
    from one count to the next exactly one of them grows."""
    shares, left = [], sum(units)
    for unit in units:
        rest = count * (left - unit) // left if left else 0
        shares.append(count - rest)
        count, left = rest, left - unit
    return shares


def _seed_of(seed: int, name: str) -> int:
    # Grain seeds epoch e with seed + e, so neighbouring seeds would share their epochs; a digest
    # keeps them apart.
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest())
