"""Guided texts are what their guide says, with drafts and without."""

import json
import re

import pytest
from small_models import config, parameters

from lm import data, model
from lm.errors import UserError
from lm.generate import Engine, Guides, NGram, Request, Sampling, generate_text

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dög"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
LIST = r"""
start: "[" item ("," item)* "]"
item: /[a-c]/ | "(" item ")"
"""


@pytest.fixture(scope="module")
def tokenizer():
    text = ['{"name": "Ada", "age": 36, "kind": "cat"} (a, b) dög [true]'] * 8
    return data.SentencePiece(vocab=300, symbols=data.CHAT_SYMBOLS).build(text)


@pytest.fixture(scope="module")
def engines(tokenizer):
    of = config(vocab=tokenizer.vocab + 9)  # padded, as vocabularies often are
    of = model.Model(of, parameters(of))
    plain = Engine(of, context=256, rows=(32,), exact=False)
    return plain, Engine(
        of, context=256, rows=(32,), exact=False, speculation=NGram(shortest=1, tokens=6)
    )


def write(tokenizer, engines, guide, seeds=range(6), max_tokens=200):
    """Texts of several seeds; the same with drafts."""
    requests = [
        Request(
            prompt=[tokenizer.bos],
            max_tokens=max_tokens,
            guide=guide,
            seed=seed,
            sampling=Sampling(temperature=seed / 3),
            stop_tokens=tokenizer.stops,
        )
        for seed in seeds
    ]
    plain, drafting = engines
    outputs = plain.generate(requests)
    with_drafts = [drafting.generate([request])[0] for request in requests]
    assert [(o.tokens, o.logprobs) for o in outputs] == [
        (o.tokens, o.logprobs) for o in with_drafts
    ]
    assert {output.finished for output in outputs} == {"stop"}
    return [tokenizer.decode(output.tokens) for output in outputs]


def test_json_schema(tokenizer, engines):
    for text in write(tokenizer, engines, Guides(tokenizer).json_schema(SCHEMA)):
        found = json.loads(text)
        assert set(found) == {"name", "age", "kind", "tags"}
        assert len(found["name"]) <= 5 and 0 <= found["age"] <= 99
        assert found["kind"] in ("cat", "dög") and len(found["tags"]) <= 2
    assert engines[1].accepted > 0


def test_regular_expression_choice_and_grammar(tokenizer, engines):
    guides = Guides(tokenizer)
    pattern = r"(ab|c){2,9}: [0-9]{3}\.(é|ß)"
    texts = write(tokenizer, engines, guides.regex(pattern))
    assert all(re.fullmatch(pattern, text) for text in texts) and len(set(texts)) > 1
    choices = ["yes", "no", 'a "quote" \\ and 日本']
    assert set(write(tokenizer, engines, guides.choice(choices))) <= set(choices)
    for text in write(tokenizer, engines, guides.grammar(LIST), range(3)):
        assert re.fullmatch(r"\[[(]*[a-c][)]*(,[(]*[a-c][)]*)*\]", text)
        assert text.count("(") == text.count(")")


def test_a_stop_token_may_end_a_text_only_where_it_is_complete(tokenizer, engines):
    for text in write(tokenizer, engines, Guides(tokenizer).regex("x+y?"), range(8)):
        assert re.fullmatch("x+y?", text)


def test_a_guided_text_after_a_prompt_that_ends_in_spaces(tokenizer, engines):
    guide = Guides(tokenizer).regex("[0-9]{2}")
    (text,) = generate_text(engines[0], tokenizer, ["a  "], max_tokens=9, guide=guide)
    assert re.fullmatch("[0-9]{2}", text.text)


def test_a_guide_serves_many_requests_and_length_still_ends_them(tokenizer, engines):
    guide = Guides(tokenizer).json_object()
    request = Request(prompt=[5], max_tokens=3, guide=guide, sampling=Sampling(temperature=1))
    for output in engines[0].generate([request] * 3):
        assert output.finished in ("max_tokens", "stop")
        assert tokenizer.decode(output.tokens).lstrip().startswith("{")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda g: g.json_schema({"type": "foo"}), "JSON schema cannot be used: .*foo"),
        (lambda g: g.regex("(a"), "regular expression cannot be used: .*unclosed group"),
        (lambda g: g.grammar("start: foo"), 'grammar cannot be used: .*unknown name: "foo"'),
    ],
)
def test_bad_descriptions_are_refused(tokenizer, make, named):
    with pytest.raises(UserError, match=named) as error:
        make(Guides(tokenizer))
    assert "\n" not in str(error.value)


def test_a_request_takes_a_guide_only():
    with pytest.raises(UserError, match="guide"):
        Request(prompt=[1], guide={"type": "object"})
