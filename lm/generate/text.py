"""Text from a model: prompts are encoded, tokens decoded as they come, stop strings found in the
text whatever tokens it came in."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lm import model
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.generate import decode
from lm.generate.sampling import Sampling

CHUNK = 8  # tokens between two looks at the text, where somebody looks


class Text(NamedTuple):
    """What was generated for one prompt.

    text       without the prompt, and without the stop string and what came after it
    tokens     their ids, up to and including the one that completed a stop string
    logprobs   as in decode.Result
    finished   as in decode.Result; 'stop' for stop strings too
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finished: str


def generate_text(
    config: model.Config,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    context: int,
    max_tokens: int,
    sampling: Sampling | None = None,
    key: jax.Array | int = 0,
    stop: Sequence[str] = (),
    stream: Callable[[int, str], None] | None = None,
    cache_dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> list[Text]:
    """Continues each prompt, until the end of the document at most.

    Args:
        prompts: texts; each is read as the beginning of a document, and may be empty.
        stop: strings that end a row where they first appear in its generated text.
        stream: called with (index of the prompt, piece of text) as text is generated. The pieces of
            a row concatenate to its text. Characters are whole, and what may yet turn out to be
            part of a stop string is held back.

        The others are those of `decode.generate`.
    """
    if "" in stop:
        raise UserError("stop='' would stop at once; leave it out.")
    readers = [_Reader(tokenizer, stop) for _ in prompts]
    ended: set[int] = set()
    for results in decode.stream(
        config,
        params,
        [_begin(tokenizer, prompt) for prompt in prompts],
        context=context,
        max_tokens=max_tokens,
        sampling=sampling,
        key=key,
        stop_tokens=tokenizer.stops,
        cache_dtype=cache_dtype,
        mesh=mesh,
        chunk=CHUNK if stop or stream else max_tokens,
        ended=ended,
    ):
        for row, (reader, result) in enumerate(zip(readers, results, strict=True)):
            piece = reader.read(result)
            if piece and stream:
                stream(row, piece)
            if reader.stopped:
                ended.add(row)
    return [reader.result() for reader in readers]


def _begin(tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt)
    begun = ids[: len(tokenizer.prefix)] == list(tokenizer.prefix)  # by a chat template
    return (ids if begun else [*tokenizer.prefix, *ids]) or [tokenizer.bos]


class _Reader:
    """The text of one row as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._decoder = tokenizer.stream()
        self._stop = stop
        self._last = decode.Result([], [], None)
        self._text = ""
        self._given = 0  # characters given out
        self._read = 0  # tokens
        self.stopped = False

    def read(self, result: decode.Result) -> str:
        """Reads what is new in `result` and gives out the text that is certain by now."""
        for token in result.tokens[self._read :]:
            if self.stopped:
                break
            self._read += 1
            self._append(self._decoder.push([token]))
        if result.finished and not self._last.finished and not self.stopped:
            self._append(self._decoder.finish())
        self._last = result
        certain = len(self._text)
        if not (self.stopped or result.finished):
            certain -= self._held_back()
        piece, self._given = self._text[self._given : certain], certain
        return piece

    def result(self) -> Text:
        """The row, once finished."""
        finished = "stop" if self.stopped else self._last.finished
        read = slice(self._read)
        return Text(self._text, self._last.tokens[read], self._last.logprobs[read], finished)

    def _append(self, piece: str) -> None:
        """Adds to the text, which ends where the first stop string begins."""
        before = len(self._text)
        self._text += piece
        # A stop string that ends in this piece begins less than its own length before it.
        starts = [self._text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop]
        found = [start for start in starts if start >= 0]
        if found:
            self.stopped = True
            self._text = self._text[: min(found)]

    def _held_back(self) -> int:
        """Characters at the end of the text that begin a stop string."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, len(stop))
                if self._text.endswith(stop[:length])
            ),
            default=0,
        )
