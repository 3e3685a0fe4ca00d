"""Which variant answers a request: names of runs, and splits by weight (A/B tests, canaries)."""

import hashlib
import itertools
import math
import os
import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lm.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+-]*")


class Source(NamedTuple):
    """A folder to serve, its name, and its share of the requests (None: asked for by name)."""

    name: str
    folder: str
    weight: float | None = None


def parse(text: str) -> Source:
    """The source of 'FOLDER', 'NAME=FOLDER' or 'NAME=FOLDER:WEIGHT'."""
    name, equals, folder = text.partition("=")
    if not equals or os.path.exists(text):
        name, folder = None, text
    head, colon, tail = folder.rpartition(":")
    weight = None
    if colon and not os.path.exists(folder) and re.fullmatch(r"[0-9.eE+-]+", tail):
        folder = head
        try:
            weight = float(tail)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise UserError(f"{text}: the weight {tail} must be a number from zero on.")
    name = os.path.basename(os.path.abspath(folder)) if name is None else name
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{text}: the model's name {name!r} must have letters, digits and ._:/+- only; give "
            "one, as in NAME=FOLDER."
        )
    return Source(name, folder, weight)


def check_names(sources: Sequence[Source], adapters: Sequence[Source], split: str) -> None:
    """Raises UserError unless names are different, and either all runs or none have weights."""
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and (len(weights) < len(sources) or not sum(weights)):
        raise UserError(
            "Give every run a weight, one of them above zero, as in A=RUN1:0.9 B=RUN2:0.1; or none."
        )
    if adapters and len(sources) > 1:
        raise UserError("--adapter needs one RUN, whose weights the adapters share.")
    if any(source.weight is not None for source in adapters):
        raise UserError("--adapter takes no weight; ask for an adapter by its name.")
    names = [source.name for source in (*sources, *adapters)] + [split] * bool(weights)
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two models are called {name!r}; name them, as in A=RUN1 B=RUN2.")


class Split:
    """Chooses a name with the probability of its weight.

    A user always gets the same one, on every server with the same weights. When weights change,
    few users change.
    """

    def __init__(self, weights: Mapping[str, float]):
        total = sum(weights.values())
        self.weights = {name: weight / total for name, weight in weights.items()}
        ends = list(itertools.accumulate(self.weights.values()))
        self._ends = list(zip(self.weights, ends))

    def choose(self, user: str | None) -> str:
        """A name, by the hash of the user, or at random."""
        point = random.random() if user is None else _point(user)
        at_point = (name for name, end in self._ends if point < end)
        # Rounding may leave the last end a little below 1.
        return next(at_point, next(name for name in reversed(self.weights) if self.weights[name]))


def _point(user: str) -> float:
    """A number from 0 to 1, of which users have uniformly distributed ones."""
    digest = hashlib.blake2b(user.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
