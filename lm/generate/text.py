"""Text generation: encodes prompts, decodes tokens as they are generated, and finds stop strings in
the text, across token boundaries."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.generate import decode
from lm.generate.sampling import Sampling
from lm.model import Config, Model

CHUNK = 8  # tokens between two checks of the text, with stop strings or streaming


class Text(NamedTuple):
    """The continuation of one prompt.

    text       without the prompt, the stop string and anything after it
    tokens     ids, up to and including the one that completed a stop string. After a prompt that
               ends in spaces the first one begins with these spaces (`generate_text`)
    logprobs   as in decode.Result
    finished   as in decode.Result; 'stop' for stop strings too
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finished: str


def generate_text(
    model: Model,
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
) -> list[Text]:
    """Continues each prompt, at most to the end of the document.

    Tokenizers encode a space together with the word after it, so models rarely see a lone space
    token. The spaces at the end of a prompt are therefore taken from its tokens, and the first
    generated token must begin with them ("token healing"). They are not repeated in the text.

    Args:
        prompts: beginnings of documents; may be empty.
        stop: strings that end a row where they first occur in its generated text.
        stream: called with (index of the prompt, piece of text) as text is generated. The pieces of
            a row concatenate to its text. Characters are whole, and the beginning of a possible
            stop string is held back.

        The others are those of `decode.generate`.
    """
    for name, values in (("prompts", prompts), ("stop", stop)):
        if isinstance(values, str) or not all(isinstance(value, str) for value in values):
            raise UserError(f"{name}={values!r} must be a list of texts.")
    if "" in stop:
        raise UserError("stop='' would stop at once; leave it out.")
    begins = [_begin(tokenizer, prompt) for prompt in prompts]
    readers = [Reader(tokenizer, stop, begin.spaces) for begin in begins]
    ended: set[int] = set()
    for results in decode.stream(
        model,
        [begin.ids for begin in begins],
        context=context,
        max_tokens=max_tokens,
        sampling=sampling,
        key=key,
        stop_tokens=tokenizer.stops,
        cache_dtype=cache_dtype,
        first_tokens=[begin.first for begin in begins],
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


def check_prompts(
    config: Config, tokenizer: Tokenizer, prompts: Sequence[str], context: int
) -> None:
    """Raises UserError for prompts that cannot be continued within `context` tokens."""
    decode.check_prompts(config, [_begin(tokenizer, each).ids for each in prompts], context)


class _Begin(NamedTuple):
    """An encoded prompt, without the `spaces` at its end that the first token must repeat."""

    ids: list[int]
    first: tuple[int, ...] | None  # ids that begin with the spaces; None: no spaces, any id
    spaces: int


def _begin(tokenizer: Tokenizer, prompt: str) -> _Begin:
    ids = tokenizer.encode(prompt)
    # A chat template may have added the prefix already.
    if ids[: len(tokenizer.prefix)] != list(tokenizer.prefix):
        ids = [*tokenizer.prefix, *ids]
    last = tokenizer.decode_bytes(ids[-1:])
    if not last or last.strip(b" "):
        return _Begin(ids or [tokenizer.bos], None, 0)
    return _Begin(ids[:-1] or [tokenizer.bos], _starting_with(tokenizer, last), len(last))


@functools.lru_cache(maxsize=8)
def _starting_with(tokenizer: Tokenizer, text: bytes) -> tuple[int, ...]:
    """The ids whose text begins with `text`."""
    return tuple(i for i in range(tokenizer.vocab) if tokenizer.decode_bytes([i]).startswith(text))


class Reader:
    """Decodes the tokens of one row as they are generated, and drops `spaces` at the beginning."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], spaces: int = 0):
        self._decoder = tokenizer.stream()
        self._stop = stop
        self._last = decode.Result([], [], None)
        self._text = ""
        self._spaces = spaces  # still to be dropped
        self._emitted = 0  # characters
        self._read = 0  # tokens
        self.stopped = False

    def read(self, result: decode.Result) -> str:
        """Decodes the new tokens of `result` and returns the text that can be emitted."""
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
        piece, self._emitted = self._text[self._emitted : certain], certain
        return piece

    def result(self) -> Text:
        """The finished row."""
        finished = "stop" if self.stopped else self._last.finished
        read = slice(self._read)
        return Text(self._text, self._last.tokens[read], self._last.logprobs[read], finished)

    def _append(self, piece: str) -> None:
        """Appends to the text; cuts it where the first stop string begins."""
        dropped = min(self._spaces, len(piece))
        self._spaces -= dropped
        piece = piece[dropped:]
        before = len(self._text)
        self._text += piece
        # A stop string that ends in this piece begins less than its length before the piece.
        starts = [self._text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop]
        found = [start for start in starts if start >= 0]
        if found:
            self.stopped = True
            self._text = self._text[: min(found)]

    def _held_back(self) -> int:
        """Number of characters at the end of the text that may begin a stop string."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, len(stop))
                if self._text.endswith(stop[:length])
            ),
            default=0,
        )
