"""Mixtures of sources: one sequence order over several sources, with weights that may change at a
step."""

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import grain
import numpy as np

from lm.data.sources import Source
from lm.errors import UserError, check_name, check_not_negative

# Weights as declared: one table, or ((step, table), ...) from step 0 on.
Weights = dict[str, float] | tuple[tuple[int, dict[str, float]], ...]
# Normalized weights: phases whose tables name every source.
Phases = tuple[tuple[int, dict[str, float]], ...]

_SMALL = 1 << 16  # elements; below this a permutation is held in memory
_UNITS = 1 << 32  # weights are rounded to this fraction of their sum


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Named sources and the fraction of sequences from each: `weights={"web": 0.8, "code": 0.2}`,
    or a schedule by step, `weights=((0, {...}), (1000, {...}))`. Default: sources are weighted by
    their number of tokens. Sources may be of different kinds: conversations with the loss on the
    answers, and text with a loss on every token, to replay pre-training data."""

    sources: dict[str, Source]
    weights: dict[str, float] | tuple[tuple[int, dict[str, float]], ...] = ()

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError(
                "data.sources={} is empty; add a source, as in {'web': data.Text(...)}."
            )
        for name, source in self.sources.items():
            if not isinstance(source, Source):
                raise UserError(f"data.sources.{name} must be a source, not {source!r}.")
            if len(name) > 100:
                raise UserError(f"data.sources: {name[:20]!r}... is longer than 100 letters.")
            if not name.replace("_", "").replace("-", "").isalnum():
                raise UserError(f"data.sources: {name!r} must be letters, digits, '_' and '-'.")
        if self.weights:
            phases(self.weights, dict.fromkeys(self.sources, 1))


def sources_of(declared: Source | Mixture) -> list[Source]:
    """The sources of a mixture; of a source, itself."""
    return list(declared.sources.values()) if isinstance(declared, Mixture) else [declared]


def phases(weights: Weights, tokens: Mapping[str, int]) -> Phases:
    """Normalizes `weights`; without any, sources are weighted by `tokens`. Raises UserError for
    unknown sources, negative or zero weights and steps out of order."""
    if not weights:
        weights = {name: float(count) for name, count in tokens.items()}
    steps = ((0, weights),) if isinstance(weights, Mapping) else tuple(weights)
    for each in steps:
        is_pair = isinstance(each, tuple | list) and len(each) == 2
        if not is_pair or type(each[0]) is not int or not isinstance(each[1], Mapping):
            raise UserError(
                f"data.weights has {each!r}; a schedule is pairs of a step and a table, as in "
                "((0, {...}), (1000, {...}))."
            )
    if steps[0][0] != 0 or any(b[0] <= a[0] for a, b in pairwise(steps)):
        raise UserError(
            f"data.weights must begin at step 0 and rise; its steps are {[s for s, _ in steps]}."
        )
    for _, table in steps:
        for name, weight in table.items():
            check_name("data.weights", name, tokens)
            check_not_negative(**{f"data.weights.{name}": weight})
        if not sum(table.values()) > 0:
            raise UserError(f"data.weights={table!r} must have a weight above zero.")
        if sum(table.values()) == math.inf:
            raise UserError(
                f"data.weights={table!r} have no finite sum; divide them by the largest."
            )
    return tuple((step, {name: t.get(name, 0.0) for name in tokens}) for step, t in steps)


def order(
    stages: Mapping[str, Sequence[int]],
    weights: Phases,
    sequences_before: Callable[[int], int],
    seed: int,
) -> grain.MapDataset:
    """The global order of sequences: an infinite dataset of (source name, sequence number).

    Each source is shuffled on its own, differently in every epoch. `stages` has the number of its
    sequences; or several numbers, whose sequences follow one another in the first epoch. Where the
    weights change, at global sequence `sequences_before(step)`, each source continues from its
    current position.
    """
    names = list(stages)
    datasets = [
        _shuffled(stages[name], _seed_of(seed, name)).map(lambda number, name=name: (name, number))
        for name in names
    ]
    starts = [sequences_before(step) for step, _ in weights]
    selection = _Selection(starts, [[table[name] for name in names] for _, table in weights])
    return grain.MapDataset.select_from_datasets(datasets, selection)


def _shuffled(stages: Sequence[int], seed: int) -> grain.MapDataset:
    """0 .. sum(stages) - 1 in a new order in every epoch, repeated forever. In the first epoch the
    stages follow one another."""
    count = sum(stages)
    if len(stages) == 1 and count >= _SMALL:
        return grain.MapDataset.range(count).shuffle(seed=seed).repeat()
    return grain.MapDataset.source(_Permutations(stages, seed))


class _Permutations:
    """Grain's shuffle for few elements, or in stages. Grain draws from 65,536 positions until it
    hits an element, which takes 20 ms per element of a list of two."""

    def __init__(self, stages: Sequence[int], seed: int):
        self._count = sum(stages)
        self._epoch = lru_cache(2)(lambda epoch: _permutation(stages, seed, epoch))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        epoch, position = divmod(index, self._count)
        return int(self._epoch(epoch)[position])


def _permutation(stages: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    # NumPy guarantees the same RandomState numbers in every version.
    random = np.random.RandomState(_seed_of(seed, str(epoch)))
    if epoch:
        return random.permutation(sum(stages))
    firsts = np.cumsum(stages) - stages
    return np.concatenate([first + random.permutation(n) for first, n in zip(firsts, stages)])


class _Selection(grain.transforms.DatasetSelectionMap):
    """Stateless map from global index to (source, index within the source)."""

    def __init__(self, starts: Sequence[int], weights: Sequence[Sequence[float]]):
        self._phases = []
        used = [0] * len(weights[0])  # sequences of each source before the phase
        for number, (start, row) in enumerate(zip(starts, weights)):
            units = [round(weight / sum(row) * _UNITS) for weight in row]
            self._phases.append((start, units, used))
            if number + 1 < len(starts):
                more = _shares(starts[number + 1] - start, units)
                used = [a + b for a, b in zip(used, more)]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        start, units, used = next(p for p in reversed(self._phases) if p[0] <= index)
        before = _shares(index - start, units)
        after = _shares(index - start + 1, units)
        source = next(i for i, (a, b) in enumerate(zip(before, after)) if b > a)
        return source, used[source] + before[source]


def _shares(count: int, units: Sequence[int]) -> list[int]:
    """How many of the first `count` sequences come from each source. Each source takes its fraction
    of what earlier sources left, rounded up. Shares grow monotonically with `count` and sum to it,
    so exactly one of them grows from one count to the next."""
    shares, left = [], sum(units)
    for unit in units:
        rest = count * (left - unit) // left if left else 0
        shares.append(count - rest)
        count, left = rest, left - unit
    return shares


def _seed_of(seed: int, name: str) -> int:
    # Grain seeds epoch e with seed + e, so neighbouring seeds would share epochs; hashing separates
    # them.
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest())
