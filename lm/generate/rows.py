"""The rows of the engine's programs: the token of each, where it stands, and what is drawn after
it."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lm.generate import programs
from lm.generate.request import MOST_LOGPROBS
from lm.generate.scheduler import Job, Reach

_MOST = np.iinfo(np.int32).max


class Row(NamedTuple):
    """The token of a job at a place in its sequence; after the tokens of the job stand those of its
    draft."""

    job: Job
    place: int

    @property
    def drafted(self) -> int:
        """Tokens of the draft up to this row. Negative: before the last token of the job."""
        return self.place + 1 - len(self.job.tokens)

    @property
    def draws(self) -> bool:
        """Whether the token that follows is drawn."""
        return self.drafted >= 0

    def token(self, place: int) -> int:
        """The token of the sequence at `place`; 0 behind its end."""
        beyond = place - len(self.job.tokens)
        if beyond < 0:
            return self.job.tokens[place]
        return self.job.draft[beyond] if beyond < len(self.job.draft) else 0

    @property
    def own(self) -> list[int]:
        """The tokens after the prompt, up to this row."""
        return [*self.job.tokens[self.job.prompt :], *self.job.draft[: self.drafted]]


def make_batch(
    rows: Sequence[Row], size: int, reaches: Sequence[Reach], width: int
) -> programs.Batch:
    """What `programs.forward` reads; `width` is the most pages of a sequence."""
    ints_r4 = np.zeros((size, 4), np.int32)
    tables = np.zeros((len(reaches), size, width), np.int32)
    for number, row in enumerate(rows):
        job, place = row
        ints_r4[number] = row.token(place), place, 1, row.token(place + 1)
        if number and rows[number - 1].job is job:
            tables[:, number] = tables[:, number - 1]
            continue
        for table, reach in zip(tables, reaches, strict=True):
            pages = job.pages[reach]
            table[number, : len(pages)] = [page or 0 for page in pages]
    return programs.Batch(ints_r4, tables)


def draw(logits_rv: jax.Array, rows: Sequence[Row], following: np.ndarray) -> programs.Drawn:
    """Draws a token after each row that draws."""
    size, vocab = logits_rv.shape
    ints, floats = np.zeros((size, 4), np.int32), np.zeros((size, 4), np.float32)
    ints[:, 3] = _MOST
    floats[:] = (0, np.inf, 0, 1)
    names, top = set(), 0
    for number, row in enumerate(rows):
        if row.draws:
            request = row.job.request
            own = request.sampling.filters()
            names |= set(own)
            top = max(top, request.logprobs)
            seed = np.uint32(request.seed).view(np.int32)
            step = len(row.job.result.tokens) + row.drafted
            ints[number] = seed, request.index, step, own.get("top_k", _MOST)
            floats[number] = (
                own.get("temperature", 0),
                own.get("top_p", np.inf),
                own.get("min_p", 0),
                own.get("repetition_penalty", 1),
            )
    return programs.draw(
        *(logits_rv, following, ints, floats),
        _bias(rows, size, vocab),
        _seen(rows, size, vocab) if "repetition_penalty" in names else None,
        random="temperature" in names,
        filters=tuple(sorted(names & {"top_k", "top_p", "min_p"})),
        top=MOST_LOGPROBS if top else 0,
    )


def _seen(rows: Sequence[Row], size: int, vocab: int) -> np.ndarray:
    """The tokens that occurred, [R, V]."""
    seen_rv = np.zeros((size, vocab), bool)
    for number, row in enumerate(rows):
        if row.draws:
            seen_rv[number, row.job.tokens] = True
            seen_rv[number, row.job.draft[: row.drafted]] = True
    return seen_rv


def _bias(rows: Sequence[Row], size: int, vocab: int) -> np.ndarray | None:
    """What is added to logits, [R, V]; None: nothing."""
    adjusted = [(n, row) for n, row in enumerate(rows) if row.draws and row.job.request.adjusts]
    if not adjusted:
        return None
    bias_rv = np.zeros((size, vocab), np.float32)
    for number, row in adjusted:
        request, own, bias_v = row.job.request, row.own, bias_rv[number]
        tokens, counts = np.unique(np.array(own, np.int32), return_counts=True)
        bias_v[tokens] -= request.presence_penalty + request.frequency_penalty * counts
        for token, value in request.logit_bias.items():
            bias_v[token] += value
        if request.first_tokens is not None and not own:
            others = np.ones(vocab, bool)
            others[list(request.first_tokens)] = False
            bias_v[others] = -np.inf
        if row.job.guide is not None:
            allowed = row.job.guide.allowed(row.job.draft[: row.drafted])
            bias_v[: len(allowed)][~allowed] = -np.inf
            bias_v[len(allowed) :] = -np.inf
    return bias_rv
