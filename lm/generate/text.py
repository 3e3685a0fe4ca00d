"""Text generation: encodes prompts, decodes tokens as they are generated, and finds stop strings in
the text, across token boundaries."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.generate import decode
from lm.generate.engine import Engine
from lm.generate.guide import Guide
from lm.generate.request import Request
from lm.generate.sampling import Sampling
from lm.model import Config


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
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    stream: Callable[[int, str], None] | None = None,
    guide: Guide | None = None,
) -> list[Text]:
    """Continues each prompt, at most to the end of the document.

    Tokenizers encode a space together with the word after it, so models rarely see a lone space
    token. The spaces at the end of a prompt are therefore taken from its tokens, and the first
    generated token must begin with them ("token healing"). They are not repeated in the text.

    Args:
        prompts: beginnings of documents; may be empty.
        sampling: default: Sampling(), temperature 1.
        seed: of the random numbers; prompt i uses index i of them (see Request).
        stop: strings that end a row where they first occur in its generated text.
        stream: called with (index of the prompt, piece of text) as text is generated. The pieces of
            a row concatenate to its text. Characters are whole, and the beginning of a possible
            stop string is held back.
        guide: what each continuation must be like (see Guides).

    Raises UserError for a prompt longer than the engine's context, and for logits that are not
    finite.
    """
    for name, values in (("prompts", prompts), ("stop", stop)):
        if isinstance(values, str) or not all(isinstance(value, str) for value in values):
            raise UserError(f"{name}={values!r} must be a list of texts.")
    if "" in stop:
        raise UserError("stop='' would stop at once; leave it out.")
    begins = [begin(tokenizer, prompt, guide is not None) for prompt in prompts]
    decode.check_prompts(engine.model.config, [each.ids for each in begins], engine.context)
    requests = [
        Request(
            prompt=begun.ids,
            max_tokens=max_tokens,
            sampling=sampling or Sampling(),
            seed=seed,
            index=row,
            stop_tokens=tokenizer.stops,
            first_tokens=begun.first,
            guide=guide,
        )
        for row, begun in enumerate(begins)
    ]
    readers = [Reader(tokenizer, stop, begun.spaces) for begun in begins]
    return write(engine, requests, readers, stream)


def write(
    engine: Engine,
    requests: Sequence[Request],
    readers: Sequence["Reader"],
    stream: Callable[[int, str], None] | None = None,
) -> list[Text]:
    """The texts of requests, each decoded by its reader. `stream` is called with (row, piece)."""
    with contextlib.closing(engine.follow(requests)) as changes:
        for row, job in changes:
            piece = readers[row].read(job.result)
            if piece and stream:
                stream(row, piece)
            if readers[row].stopped:
                engine.cancel(job, "stop")
    return [reader.result() for reader in readers]


def check_prompts(
    config: Config, tokenizer: Tokenizer, prompts: Sequence[str], context: int
) -> None:
    """Raises UserError for prompts that cannot be continued within `context` tokens."""
    decode.check_prompts(config, [begin(tokenizer, each).ids for each in prompts], context)


class Begin(NamedTuple):
    """An encoded prompt, without the `spaces` at its end that the first token must repeat."""

    ids: Sequence[int]
    first: tuple[int, ...] | None = None  # ids that begin with the spaces; None: any id
    spaces: int = 0


def begin(tokenizer: Tokenizer, prompt: str, guided: bool = False) -> Begin:
    """Encodes a prompt, with what the tokenizer puts in front of prompts. `guided`: the first token
    must follow a guide, so the prompt keeps its spaces."""
    ids = tokenizer.encode(prompt)
    # A chat template may have added the prefix already.
    if ids[: len(tokenizer.prefix)] != list(tokenizer.prefix):
        ids = [*tokenizer.prefix, *ids]
    last = tokenizer.decode_bytes(ids[-1:])
    if guided or not last or last.strip(b" "):
        return Begin(ids or [tokenizer.bos])
    return Begin(ids[:-1] or [tokenizer.bos], _starting_with(tokenizer, last), len(last))


@functools.lru_cache(maxsize=8)
def _starting_with(tokenizer: Tokenizer, text: bytes) -> tuple[int, ...]:
    """The ids whose text begins with `text`."""
    return tuple(i for i in range(tokenizer.vocab) if tokenizer.decode_bytes([i]).startswith(text))


class Reader:
    """Decodes the tokens of one row as they are generated, and drops `spaces` at the beginning.

    Text is emitted once it is certain: characters are whole, and what may begin a stop string is
    held back. So a token takes time that does not depend on the length of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], spaces: int = 0):
        self._decoder = tokenizer.stream()
        self._stop = stop
        self._spaces = spaces  # still to be dropped
        self._last: Any = decode.Result([], [], None)
        self._read = 0  # tokens
        self._emitted: list[str] = []
        self._held = ""
        self.stopped = False

    def read(self, result: Any) -> str:
        """Decodes the new tokens of a decode.Result or an Output and returns the text that can be
        emitted."""
        emitted = len(self._emitted)
        while self._read < len(result.tokens) and not self.stopped:
            self._append(self._decoder.push([result.tokens[self._read]]))
            self._read += 1
        if result.finished and not self._last.finished and not self.stopped:
            self._append(self._decoder.finish())
            self._emit(len(self._held))
        self._last = decode.Result(result.tokens, result.logprobs, result.finished)
        return "".join(self._emitted[emitted:])

    def result(self) -> Text:
        """The text so far."""
        finished = "stop" if self.stopped else self._last.finished
        tokens, logprobs = (x[: self._read] for x in (self._last.tokens, self._last.logprobs))
        return Text("".join(self._emitted), tokens, logprobs, finished)

    def _append(self, piece: str) -> None:
        """Appends to the text; cuts it where the first stop string begins."""
        dropped = min(self._spaces, len(piece))
        self._spaces -= dropped
        self._held += piece[dropped:]
        # A stop string cannot begin in text that was emitted.
        found = [start for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
        self._emit(len(self._held) - (0 if self.stopped else self._uncertain()))

    def _emit(self, count: int) -> None:
        self._emitted.append(self._held[:count])
        self._held = self._held[count:]

    def _uncertain(self) -> int:
        """Number of characters at the end of the text that may begin a stop string."""
        return max((overlap(self._held, stop) for stop in self._stop), default=0)


def overlap(text: str, mark: str) -> int:
    """Number of characters at the end of `text` that may begin `mark`."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(mark[:n])), 0)
