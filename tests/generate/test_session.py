"""A session gives the tokens of a fresh generation, however much of its cache it can use."""

import numpy as np
import pytest
from small_models import VOCAB, config, parameters

from lm import data, generate, model
from lm.errors import UserError
from lm.generate import Sampling, Session

CONTEXT = 48
OPTIONS = {"max_tokens": 5, "context": CONTEXT}


def models():
    yield "full", config()
    attention = model.GQA(heads=2, kv_heads=1, head_dim=8, window=6)
    yield "window", config(attention=attention)


def last(results):
    *_, result = results
    return result


@pytest.fixture(scope="module", params=dict(models()))
def apply(request):
    declared = dict(models())[request.param]
    return model.Model(declared, parameters(declared))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.5),
        pytest.param(Sampling(temperature=0), marks=pytest.mark.slow),
    ],
    ids=["sampled", "greedy"],
)
def test_turns_equal_fresh_generations(apply, sampling):
    """Each turn continues the one before; the last ones change, shorten and repeat the history."""
    session = Session(apply, context=CONTEXT)
    random = np.random.default_rng(0)
    ids = random.integers(0, VOCAB, 4).tolist()
    for turn in range(5):
        result = last(session.stream(ids, max_tokens=5, sampling=sampling, key=turn, chunk=2))
        (fresh,) = generate.generate(apply, [ids], sampling=sampling, key=turn, **OPTIONS)
        assert result.tokens == fresh.tokens and result.finished == fresh.finished
        np.testing.assert_allclose(result.logprobs, fresh.logprobs, rtol=1e-5, atol=1e-5)
        assert session.tokens == [*ids, *result.tokens[:-1]]
        more = random.integers(0, VOCAB, 3).tolist()
        history = [*ids, *result.tokens]
        ids = {3: [*history[:7], *more], 4: ids[:6]}.get(turn, [*history, *more])


def test_only_new_tokens_are_read(apply, monkeypatch):
    session, read = Session(apply, context=CONTEXT), []
    original = generate.session.decode.make_request

    def counted(prompts, *rest, **options):
        read.append(len(prompts[0]))
        return original(prompts, *rest, **options)

    monkeypatch.setattr(generate.session.decode, "make_request", counted)
    result = last(session.stream([1, 2, 3, 4], max_tokens=4, key=0))
    last(session.stream([1, 2, 3, 4, *result.tokens, 7], max_tokens=4, key=1))
    last(session.stream([1, 2, 9], max_tokens=4, key=2))
    is_window = apply.config.attention.window is not None
    assert read == [4, 2, 3 if is_window else 1]


def test_an_abandoned_stream_leaves_a_usable_session(apply):
    session = Session(apply, context=CONTEXT)
    next(session.stream([1, 2, 3], max_tokens=8, sampling=Sampling(temperature=0), chunk=2))
    result = last(session.stream([1, 2, 3], max_tokens=5, sampling=Sampling(temperature=0)))
    (fresh,) = generate.generate(apply, [[1, 2, 3]], sampling=Sampling(temperature=0), **OPTIONS)
    assert result.tokens == fresh.tokens


def test_a_sequence_that_fills_the_context_is_refused(apply):
    session = Session(apply, context=8)
    with pytest.raises(UserError, match="prompt 0 has 8 tokens"):
        last(session.stream(list(range(8)), max_tokens=1))
    assert last(session.stream([1] * 7, max_tokens=5)).finished == "context"


# Conversations


@pytest.fixture(scope="module")
def tokenizer():
    return data.SentencePiece(vocab=300, symbols=data.CHAT_SYMBOLS).train(["a stone, a tree"] * 40)


@pytest.fixture(scope="module")
def speaker(tokenizer):
    declared = config(vocab=tokenizer.vocab)
    return model.Model(declared, parameters(declared))


def talk(speaker, tokenizer, **options):
    return generate.Conversation(
        speaker, tokenizer, context=128, sampling=Sampling(temperature=0), **options
    )


def test_answers_are_what_the_rendered_conversation_continues_with(speaker, tokenizer):
    conversation, pieces = talk(speaker, tokenizer, system="Be brief."), []
    first = conversation.say("a stone", max_tokens=12, stream=pieces.append)
    second = conversation.say("a tree", max_tokens=12)
    assert "".join(pieces) == first
    assert [each["role"] for each in conversation.messages] == [
        "system",
        *("user", "assistant") * 2,
    ]
    prompt = (
        f"<|system|>Be brief.<|end|><|user|>a stone<|end|><|assistant|>{first}<|end|>"
        "<|user|>a tree<|end|><|assistant|>"
    )
    (fresh,) = generate.generate_text(
        speaker,
        tokenizer,
        [prompt],
        context=128,
        max_tokens=12,
        sampling=Sampling(temperature=0),
        stop=("<|end|>",),
    )
    assert second == fresh.text


def test_a_conversation_beyond_the_context_is_refused_and_left_as_it_was(speaker, tokenizer):
    conversation = talk(speaker, tokenizer)
    conversation.say("a stone", max_tokens=3)
    before = list(conversation.messages)
    with pytest.raises(UserError, match="the context ends at 128; begin a new one"):
        conversation.say("a tree " * 100)
    assert conversation.messages == before


def test_a_tokenizer_without_template_is_refused(speaker):
    plain = data.SentencePiece(vocab=290).train(["a stone, a tree"] * 40)
    with pytest.raises(UserError, match="has no chat template"):
        talk(speaker, plain)
