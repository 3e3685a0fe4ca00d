"""Stop strings and streaming: the text does not depend on token and chunk boundaries."""

import jax.numpy as jnp
import pytest
from small_models import config, parameters

from lm import model
from lm.data import SentencePiece
from lm.errors import UserError
from lm.generate import Engine, Sampling, generate_text
from lm.generate.decode import Result
from lm.generate.text import Reader

OPTIONS = {"max_tokens": 24, "sampling": Sampling(temperature=0.7), "seed": 1}
PROMPTS = ["a cat", "", "on the mat the"]


@pytest.fixture(scope="module")
def speaker():
    """(engine, tokenizer)"""
    texts = ["the cat sat on the mat, and that was that; äöü ☃ at the end\n"] * 20
    tokenizer = SentencePiece(vocab=300).train(texts)
    speaking = config(vocab=tokenizer.vocab)
    return Engine(model.Model(speaking, parameters(speaking)), context=64), tokenizer


@pytest.fixture(scope="module")
def free(speaker):
    """Results generated without stop strings."""
    return generate_text(*speaker, PROMPTS, **OPTIONS)


def test_text_equals_the_decoded_tokens(speaker, free):
    tokenizer = speaker[1]
    for text in free:
        assert text.text == tokenizer.decode(text.tokens)
        assert len(text.logprobs) == len(text.tokens)


def test_streamed_pieces_concatenate_to_the_text(speaker, free):
    pieces = [""] * len(PROMPTS)
    calls = 0

    def stream(row: int, piece: str) -> None:
        nonlocal calls
        calls += 1
        pieces[row] += piece

    assert generate_text(*speaker, PROMPTS, stream=stream, **OPTIONS) == free
    assert pieces == [text.text for text in free]
    assert calls > len(PROMPTS)


def test_stop_string_across_tokens_is_cut_off(speaker, free):
    tokenizer = speaker[1]
    row = max(range(len(free)), key=lambda i: len(free[i].text))
    # The stop string begins within the text of one token and ends within that of another.
    start = len(tokenizer.decode(free[row].tokens[:9])) - 1
    stop = free[row].text[start : start + 4]
    assert not any(stop in tokenizer.decode([token]) for token in free[row].tokens)
    streamed = [""] * len(PROMPTS)

    def stream(i: int, piece: str) -> None:
        streamed[i] += piece

    texts = generate_text(*speaker, PROMPTS, stop=("never said", stop), stream=stream, **OPTIONS)
    for whole, text, pieces in zip(free, texts, streamed, strict=True):
        cut, found, _ = whole.text.partition(stop)
        assert text.text == pieces == cut
        assert text.finished == ("stop" if found else whole.finished)
        assert text.tokens == whole.tokens[: len(text.tokens)]
        # The last token kept is the one that completes the stop string.
        if found:
            assert stop in tokenizer.decode(text.tokens)
            assert stop not in tokenizer.decode(text.tokens[:-1])


@pytest.mark.parametrize("prompt", ["the ", "on the mat  ", " ", "a\n    "])
def test_trailing_spaces_of_a_prompt_become_part_of_the_first_token(speaker, prompt):
    """The first token is the most likely of those that begin with the spaces."""
    engine, tokenizer = speaker
    transformer = engine.model
    ids = [*tokenizer.prefix, *tokenizer.encode(prompt)]
    spaces = tokenizer.decode_bytes(ids[-1:])
    assert spaces and not spaces.strip()
    options = {**OPTIONS, "sampling": Sampling(temperature=0)}
    pieces = []
    plain, (text, other) = (
        generate_text(*speaker, prompts, stream=lambda _, piece: pieces.append(piece), **options)
        for prompts in (["a cat", "on the mat"], [prompt, "on the mat"])
    )
    logits_v = transformer.logits(transformer(jnp.array([ids[:-1]])).hidden_btd)[0, -1]
    first = [i for i in range(tokenizer.vocab) if tokenizer.decode_bytes([i]).startswith(spaces)]
    assert len(first) > 1
    assert text.tokens[0] == max(first, key=lambda i: logits_v[i])
    assert spaces.decode() + text.text == tokenizer.decode(text.tokens)
    assert other == plain[1]
    options["sampling"] = Sampling(top_k=1)
    assert generate_text(*speaker, [prompt, "on the mat"], **options)[0].tokens[0] == text.tokens[0]


class Letters:
    """A byte-level tokenizer for `Reader`."""

    def stream(self):
        return self

    def __init__(self):
        import codecs

        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids):
        return self._decoder.decode(bytes(ids))

    def finish(self):
        return self._decoder.decode(b"", final=True)


def read(text: bytes, stop: tuple[str, ...], chunk: int) -> tuple[list[str], Reader]:
    reader = Reader(Letters(), stop)
    pieces = []
    for end in range(chunk, len(text) + chunk, chunk):
        tokens = list(text[:end])
        finished = "max_tokens" if end >= len(text) else None
        pieces.append(reader.read(Result(tokens, [0.0] * len(tokens), finished)))
    return pieces, reader


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "text, stop, expected, finished",
    [
        ("snow ☃ äö", (), "snow ☃ äö", "max_tokens"),
        ("ababac", ("abac",), "ab", "stop"),
        ("ababab", ("abac",), "ababab", "max_tokens"),
        ("one\n\ntwo", ("\n\n", "ne"), "o", "stop"),
        ("x☃y", ("☃",), "x", "stop"),
        ("stop", ("stop",), "", "stop"),
        ("aaab", ("ab", "aab"), "a", "stop"),
    ],
)
def test_reader_cuts_at_stop_strings_for_any_chunk_size(text, stop, expected, finished, chunk):
    pieces, reader = read(text.encode(), stop, chunk)
    assert "".join(pieces) == expected
    assert reader.result().text == expected
    assert reader.result().finished == finished
    # No piece contains a partial character or text that was later removed.
    assert "\ufffd" not in "".join(pieces)


def test_possible_beginning_of_a_stop_string_is_held_back():
    pieces, _ = read(b"a<|b<|end", ("<|end|>",), 1)
    assert pieces == ["a", "", "", "<|b", "", "", "", "", "<|end"]


def test_partial_character_at_the_end_becomes_a_replacement_character():
    pieces, _ = read("a☃".encode()[:-1], (), 1)
    assert pieces == ["a", "", "\ufffd"]


def test_invalid_arguments_raise_errors(speaker):
    with pytest.raises(UserError, match="stop=''"):
        generate_text(*speaker, ["a"], stop=("",), **OPTIONS)
    with pytest.raises(UserError, match=r"prompt 0 has 101 tokens.*context=64"):
        generate_text(*speaker, ["1" * 100], **OPTIONS)
