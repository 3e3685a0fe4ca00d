"""Structured output: which tokens may follow, so that a text is JSON of a schema, matches a regular
expression, or is of a grammar. The masks are those of llguidance
(github.com/guidance-ai/llguidance)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.data.tokenizer import Tokenizer
from lm.errors import UserError


class Guides:
    """Makes guides for texts of a tokenizer.

        guide = Guides(tokenizer).json_schema({"type": "object", ...})
        engine.generate([Request(prompt=ids, guide=guide)])

    `ends` are the ids that may end a text where it is complete; default: those that end a document.
    For chat, give `lm.data.end_of_turn(tokenizer)[0]`.

    Each method raises UserError for a description that llguidance does not take.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int] | None = None):
        llguidance = _llguidance()
        ends = list(tokenizer.stops if ends is None else ends)
        words = llguidance.TokenizerWrapper(_Words(tokenizer, ends))
        self._tokenizer = llguidance.LLTokenizer(words, eos_token=ends)

    def json_schema(self, schema: Mapping[str, Any]) -> "Guide":
        """JSON that is valid under a JSON schema."""
        # Without a limit, a small model may write nothing but white space.
        spaces = {"whitespace_pattern": r"[ \n]{1,20}"}
        grammar = _llguidance().LLMatcher.grammar_from_json_schema(dict(schema), overrides=spaces)
        return self._guide("JSON schema", grammar)

    def json_object(self) -> "Guide":
        """A JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> "Guide":
        """Text that matches a regular expression as a whole, in the syntax of Rust's `regex`."""
        return self._guide(
            "regular expression", _llguidance().LLMatcher.grammar_from_regex(pattern)
        )

    def choice(self, texts: Sequence[str]) -> "Guide":
        """One of some texts."""
        return self.grammar("start: " + " | ".join(json.dumps(text) for text in texts))

    def grammar(self, lark: str) -> "Guide":
        """Text of a context-free grammar in Lark's syntax, with a rule `start`."""
        return self._guide("grammar", _llguidance().LLMatcher.grammar_from_lark(lark))

    def _guide(self, what: str, grammar: str) -> "Guide":
        matcher = _llguidance().LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"The {what} cannot be used: {_error(matcher)}")
        return Guide(matcher, self._tokenizer.vocab_size)


class Guide:
    """A description of texts, compiled for a tokenizer. `start` begins a text."""

    def __init__(self, matcher: Any, vocab: int):
        self._matcher, self._vocab = matcher, vocab

    def start(self) -> "Written":
        """A text that is written under the guide."""
        return Written(self._matcher.deep_copy(), self._vocab)


class Written:
    """How far a text under a guide is written.

    error  one sentence, if the guide failed: its grammar was too complex for the text
    """

    def __init__(self, matcher: Any, vocab: int):
        self._matcher, self._vocab = matcher, vocab
        self.error: str | None = None

    def allowed(self, draft: Sequence[int] = ()) -> np.ndarray:
        """Which ids of the tokenizer may come next, [V] bool, after the tokens of a draft."""
        matcher = self._matcher
        if draft:
            matcher = matcher.deep_copy()
            matcher.consume_tokens(list(draft))
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._vocab, bitorder="little").astype(bool)

    def valid(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft may follow."""
        return self._matcher.validate_tokens(list(draft))

    def advance(self, token: int) -> bool:
        """Writes a token. Returns whether the text is complete."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            why = _error(self._matcher)
            self.error = f"The text cannot follow its schema or grammar any further: {why}"
        return self._matcher.is_stopped()


class _Words:
    """The vocabulary as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int]):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = ends[0], tokenizer.bos
        words = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab)]
        self.special_token_ids = [i for i, w in enumerate(words) if not w or i in ends]
        self.tokens = [f"<{i}>".encode() if not w or i in ends else w for i, w in enumerate(words)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _error(matcher: Any) -> str:
    """The error of a matcher on one line, without its state."""
    return " ".join(matcher.get_error().split("\n<")[0].split())


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError('Structured output needs llguidance: pip install -e ".[serve]"') from None
    return llguidance
