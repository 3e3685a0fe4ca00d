"""The rows of the engine's programs: the token of each, where it stands, and what is drawn after
it."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lm.generate import programs
from lm.generate.request import MOST_LOGPROBS
from lm.generate.scheduler import Job, Reach

# The first one that has what is needed is used; few, because each is compiled for each size.
FORMS = (
    programs.Form(random=False, filtered=False, adjusted=False, top=0),
    programs.Form(random=True, filtered=False, adjusted=False, top=0),
    programs.Form(random=True, filtered=True, adjusted=False, top=0),
    programs.Form(random=True, filtered=False, adjusted=True, top=MOST_LOGPROBS),
    programs.Form(random=True, filtered=True, adjusted=True, top=MOST_LOGPROBS),
)
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
        request = row.job.request
        if row.draws or request.prompt_logprobs:
            top = max(top, request.logprobs)
        if row.draws:
            own = request.sampling.filters()
            names |= set(own)
            seed = np.uint32(request.seed).view(np.int32)
            step = len(row.job.result.tokens) + row.drafted
            ints[number] = seed, request.index, step, own.get("top_k", _MOST)
            floats[number] = (
                own.get("temperature", 0),
                own.get("top_p", np.inf),
                own.get("min_p", 0),
                own.get("repetition_penalty", 1),
            )
    adjusts = "repetition_penalty" in names or any(
        row.job.request.adjusts for row in rows if row.draws
    )
    form = next(
        form
        for form in FORMS
        if form.random >= ("temperature" in names)
        and form.filtered >= bool(names & {"top_k", "top_p", "min_p"})
        and form.adjusted >= adjusts
        and form.top >= top
    )
    adjustments = _adjustments(rows, size, vocab) if form.adjusted else None
    return programs.draw(programs.Draw(logits_rv, following, ints, floats, adjustments), form=form)


def warm_up(logits_rv: jax.Array) -> None:
    """Compiles all forms of `programs.draw` for logits of this shape."""
    size = len(logits_rv)
    following, ints = np.zeros(size, np.int32), np.zeros((size, 4), np.int32)
    floats = np.ones((size, 4), np.float32)
    for form in FORMS:
        adjustments = _adjustments([], *logits_rv.shape) if form.adjusted else None
        programs.draw(programs.Draw(logits_rv, following, ints, floats, adjustments), form=form)


def _adjustments(rows: Sequence[Row], size: int, vocab: int) -> programs.Adjustments:
    """What is added to the logits of each row, and the tokens that it has seen."""
    bias_rv, seen_rv = np.zeros((size, vocab), np.float32), np.zeros((size, vocab), bool)
    for number, row in enumerate(rows):
        if row.draws:
            seen_rv[number, row.job.tokens] = True
            seen_rv[number, row.job.draft[: row.drafted]] = True
            if row.job.request.adjusts:
                _add_bias(bias_rv[number], row)
    return programs.Adjustments(bias_rv, seen_rv)


def _add_bias(bias_v: np.ndarray, row: Row) -> None:
    request, own, guide = row.job.request, row.own, row.job.guide
    tokens, counts = np.unique(np.array(own, np.int32), return_counts=True)
    bias_v[tokens] -= request.presence_penalty + request.frequency_penalty * counts
    for token, value in request.logit_bias.items():
        bias_v[token] += value
    if request.first_tokens is not None and not own:
        others = np.ones(len(bias_v), bool)
        others[list(request.first_tokens)] = False
        bias_v[others] = -np.inf
    if guide is not None:
        allowed = guide.allowed(row.job.draft[: row.drafted])
        bias_v[: len(allowed)][~allowed] = -np.inf
        bias_v[len(allowed) :] = -np.inf
