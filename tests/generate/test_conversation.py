"""A conversation: the rendered chat template is what is continued."""

import pytest
from small_models import config, parameters

from lm import data, generate, model
from lm.errors import UserError
from lm.generate import Sampling

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def tokenizer():
    return data.SentencePiece(vocab=300, symbols=data.CHAT_SYMBOLS).train(["a stone, a tree"] * 40)


@pytest.fixture(scope="module")
def speaker(tokenizer):
    """An engine."""
    declared = config(vocab=tokenizer.vocab)
    return generate.Engine(model.Model(declared, parameters(declared)), context=128, page=8)


def talk(speaker, tokenizer, **options):
    return generate.Conversation(speaker, tokenizer, sampling=GREEDY, **options)


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
        max_tokens=12,
        sampling=GREEDY,
        stop=("<|end|>",),
    )
    assert second == fresh.text


def test_the_cache_keeps_earlier_turns(speaker, tokenizer):
    conversation = talk(speaker, tokenizer, system="Be very brief.")
    conversation.say("a stone, a stone", max_tokens=12)
    before = speaker.computed
    conversation.say("a tree", max_tokens=1)
    prompt = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in conversation.messages[:-1])
    ids = tokenizer.encode(prompt + "<|assistant|>")
    assert speaker.computed - before < len(ids) - 2 * speaker.page


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
