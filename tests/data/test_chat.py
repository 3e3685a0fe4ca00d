"""Conversations are read from the common shapes, rendered by the chat template, and have their loss
on what the assistant writes, with the token that ends it."""

import json
from collections import Counter

import numpy as np
import pytest
import tokenizers
from chats import trained, write
from made_up_corpus import documents

from lm import data
from lm.data.chat_template import ChatTemplate
from lm.errors import UserError

MESSAGES = [
    {"role": "user", "content": "What is a stone?"},
    {"role": "assistant", "content": "A small rock."},
    {"role": "user", "content": "And a tree?"},
    {"role": "assistant", "content": "A plant\n\nwith a trunk."},
]
# Written for these tests, with what published templates do.
TEMPLATES = {
    "marks around each turn": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "contents stripped, roles renamed": (
        "{{ bos_token }}{% for m in messages %}"
        "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "<|im_start|>{{ role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
    ),
    "an empty thought before the last answer only": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "a space around the answer, the end token after it": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
}

# As gpt-oss has it: the prompt ends before the channel, and the last message has its own end.
CHANNELS = (
    "<|im_start|>system\nToday is {{ strftime_now('%d %B') }}.<|im_end|>"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant"
    "{% if m.thinking and loop.last %} thought\n{{ m.thinking }}<|im_end|>{% endif %}"
    " final\n{{ m.content }}"
    "{{ eos_token if loop.last and not add_generation_prompt else '<|im_end|>' }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A byte-level tokenizer.json with special tokens."""
    level = tokenizers.pre_tokenizers.ByteLevel
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = (
        level(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<b>", "<e>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["a stone in its river\n\nby night <think>\n\n"] * 9, trainer)
    folder = tmp_path_factory.mktemp("imported")
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<b>", "eos_token": "<e>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    return data.load_tokenizer(folder)


def encoded(source, tokenizer):
    return [each[:3] for each in source.encode(list(source.documents()), tokenizer)]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": MESSAGES},
        {
            "conversations": [
                {"from": "human", "value": "What is a stone?"},
                {"from": "gpt", "value": "A small rock."},
            ]
        },
        {"instruction": "What is", "input": "a stone?", "output": "A small rock."},
        {"prompt": "What is a stone?", "completion": "A small rock."},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:2]},
        {"question": "What is a stone?", "answer": "A small rock."},
    ],
    ids=["messages", "ShareGPT", "Alpaca", "completion", "lists", "question"],
)
def test_common_shapes_are_read(record, own, tmp_path):
    for path in (write(tmp_path / "x.jsonl", record), str(tmp_path / "x.json")):
        (tmp_path / "x.json").write_text(json.dumps([record]))
        ((ids, weights, size),) = encoded(data.Chat(path), own)
        assert trained(own, ids, weights)[0] == "A small rock.<|end|>"
        assert ids[0] == own.bos and own.bos not in ids[1:]
        assert size == (
            len("A small rock.A plant\n\nwith a trunk.") if "messages" in record else 13
        )


@pytest.mark.parametrize("name", TEMPLATES)
def test_loss_is_on_the_answers_and_what_ends_them(name, imported, tmp_path):
    source = data.Chat(
        write(tmp_path / "x.jsonl", {"messages": MESSAGES}), template=TEMPLATES[name]
    )
    ((ids, weights, _),) = encoded(source, imported)
    first, last = trained(imported, ids, weights)
    end = "<e>" if "eos_token" in TEMPLATES[name] else "<|im_end|>"
    assert first.strip(" ") == f"A small rock.{'' if end != '<e>' else ' '}{end}"
    assert last.endswith(f"with a trunk.{'' if end != '<e>' else ' '}{end}")
    ((ids, weights, _),) = encoded(
        data.Chat(source.path, template=TEMPLATES[name], train="last"), imported
    )
    assert trained(imported, ids, weights) == [last]


def test_the_last_message_may_have_an_end_of_its_own(imported, tmp_path):
    source = data.Chat(write(tmp_path / "x.jsonl", {"messages": MESSAGES}), template=CHANNELS)
    ((ids, weights, _),) = encoded(source, imported)
    assert trained(imported, ids, weights) == [
        " final\nA small rock.<|im_end|>",
        " final\nA plant\n\nwith a trunk.<e>",
    ]


@pytest.mark.parametrize("template", [*TEMPLATES.values(), CHANNELS], ids=[*TEMPLATES, "channels"])
def test_the_prompt_of_generation_is_the_beginning_of_the_training_text(template, imported):
    """Token by token: what the model sees before an answer is what it saw in training, and the
    loss begins right there."""
    template = ChatTemplate(template, {"bos_token": "<b>", "eos_token": "<e>"})
    text, spans = template.spans(MESSAGES)
    ids, weights = data.encode_spans(text, spans, imported)
    prompt = imported.encode(template.render(MESSAGES[:3], add_generation_prompt=True))
    assert ids[: len(prompt)].tolist() == prompt
    assert weights[len(prompt) :][0] == 1 and weights[len(prompt) - 1] == 0


def test_a_template_that_rewrites_answers_is_refused(imported, tmp_path):
    source = data.Chat(
        write(tmp_path / "x.jsonl", {"messages": MESSAGES}),
        template="{% for m in messages %}{{ m.content | replace('\ue0f0', '') }}{% endfor %}",
    )
    with pytest.raises(UserError, match=r"begins 'What is a stone\?': .* changes the content"):
        encoded(source, imported)


@pytest.mark.parametrize(
    "template, words",
    [
        ("{% for m in messages %}", "not valid Jinja"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content.x }}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template, words, imported, tmp_path):
    source = data.Chat(write(tmp_path / "x.jsonl", {"messages": MESSAGES}), template=template)
    with pytest.raises(UserError, match=words):
        encoded(source, imported)


@pytest.mark.parametrize(
    "record, words",
    [
        ({"messages": []}, "without messages"),
        ({"messages": "hello"}, "must be a list of objects"),
        ({"messages": [{"role": "user"}]}, "no 'content'"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "role='robot' is not known"),
        ({"messages": MESSAGES[:1]}, "no message of the assistant"),
        ({"messages": MESSAGES[1:]}, "begins with the assistant"),
        ({"messages": [*MESSAGES[:2], MESSAGES[1]]}, "same role in a row"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": " "}]}, "an empty message"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": None}]}, "NoneType, not text"),
        ({"prompt": 3, "completion": "a"}, "int, not text"),
        ({"text": "a"}, "is no conversation.*Its fields: text"),
    ],
)
def test_bad_conversations_name_file_and_line(record, words, tmp_path):
    path = write(tmp_path / "x.jsonl", {"messages": MESSAGES}, record)
    with pytest.raises(UserError, match=rf"x\.jsonl, line 2.*{words}"):
        list(data.Chat(path).documents())


def test_records_that_cannot_be_trained_on_are_left_out_if_wanted(own, tmp_path, capsys):
    good, bad = {"messages": MESSAGES}, {"messages": MESSAGES[1:]}
    path = write(tmp_path / "x.jsonl", good, bad, {"messages": []}, bad, good)
    assert len(list(data.Chat(path, bad_records="skip").documents())) == 2
    assert capsys.readouterr().err == (
        f"{path}: left out 3 of 5 records: 2 like line 2, which begins with the assistant; 1 like "
        "line 3, which is a conversation without messages.\n"
    )
    with pytest.raises(UserError, match=r"line 2 begins .*; mend it, or set data\.bad_records"):
        list(data.Chat(path).documents())
    with pytest.raises(UserError, match=r"data\.bad_records='drop' is not known"):
        data.Chat(path, bad_records="drop")
    source = data.Chat(path, bad_records="skip", template="{{ raise_exception('no') }}")
    assert encoded(source, own) == []
    assert "chat: left out 2 of 2 records that the chat template refuses" in capsys.readouterr().err


def test_a_system_message_beside_the_prompt_is_kept(own, tmp_path):
    record = {"system_prompt": "be kind", "question": "a stone", "response": "light"}
    ((ids, _, _),) = encoded(data.Chat(write(tmp_path / "x.jsonl", record), system="x"), own)
    text = "<|system|>be kind<|end|><|user|>a stone<|end|><|assistant|>light<|end|>"
    assert own.decode(ids.tolist()) == text


@pytest.mark.parametrize("length", [5, 16, 1000])
def test_no_answer_is_lost_in_conversations_longer_than_a_sequence(
    length, own_config, tmp_path, capsys
):
    records = [
        {"prompt": f"{i} the tree", "completion": "light " * (1 + i % 30)} for i in range(40)
    ]
    source = data.Chat(write(tmp_path / "x.jsonl", *records), held_out=0)
    prepared = data.prepare(source, own_config, tmp_path / "prepared")
    loader = prepared.loader(data.BatchShape(sequences=1, length=length), seed=0)
    learned = Counter()
    for step in range(loader.sequences["chat"]):
        batch = loader.batch(step)
        learned.update(batch.targets[batch.weights > 0].tolist())
    stream = prepared.stream("chat", "train")
    has_loss = stream.weights(0, stream.tokens) > 0
    assert learned == Counter(stream.read(0, stream.tokens)[has_loss].tolist())
    assert learned[prepared.tokenizer.encode("<|end|>")[0]] == 40, "the end of each answer"
    lengths = np.diff(stream.starts) - 1
    if length == 1000:
        assert not capsys.readouterr().err
    else:
        assert (
            f"chat: {(lengths > length).sum()} of 40 conversations are longer than batch.length="
            f"{length} and cut into parts, of which later ones do not see what was said before; "
            "the first begins '<|user|>"
        ) in (message := capsys.readouterr().err)
        assert message.endswith(f"batch.length={lengths.max()} holds all of them.\n")


def test_a_tokenizer_that_joins_an_answer_with_what_stands_before_it_is_refused(tmp_path):
    """One that adds a space before texts, so that parts cannot be encoded alone."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<u>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<u>", "<b>", "<e>"], show_progress=False
    )
    made.train_from_iterator(["Q what A light"] * 9, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<b>", "eos_token": "<e>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = data.load_tokenizer(tmp_path)
    assert tokenizer.adds_space
    text = "Q what A light<e>"
    ids, weights = data.encode_spans(text, [(8, 14)], tokenizer)
    assert trained(tokenizer, ids, weights) == ["light<e>"]
    with pytest.raises(UserError, match=r"joins 'Q what A ' with what follows .* cannot begin"):
        data.encode_spans(text, [(9, 14)], tokenizer)


def test_a_tokenizer_without_template_is_refused(tokenizer, tmp_path):
    source = data.Chat(write(tmp_path / "x.jsonl", {"messages": MESSAGES}))
    with pytest.raises(UserError, match="has no chat template; train it with symbols="):
        encoded(source, tokenizer)


def test_prepared_batches_have_weights_on_the_answers_only(tmp_path):
    records = [
        {"prompt": f"What is {text[:20]}?", "completion": f"It is {i}."}
        for i, text in enumerate(documents(60))
    ]
    path = write(tmp_path / "x.jsonl", *records)
    mixture = data.Mixture(
        sources={
            "chat": data.Chat(path, held_out=0.1),
            "text": data.Documents(documents(60), held_out=0.1),
        },
        weights={"chat": 0.5, "text": 0.5},
    )
    config = data.SentencePiece(vocab=420, symbols=data.CHAT_SYMBOLS)
    prepared = data.prepare(mixture, config, tmp_path / "prepared")
    counts = prepared.counts["chat", "train"]
    loader = prepared.loader(data.BatchShape(sequences=8, length=64), seed=0)
    assert loader.sequences["chat"] > 2
    stream = prepared.stream("chat", "train")
    assert stream.losses_d.sum() == counts.tokens < stream.tokens - stream.documents
    end = prepared.tokenizer.encode("<|end|>")[0]
    seen = 0
    for step in range(12):
        batch = loader.batch(step)
        for row in range(8):
            for segment in range(1, batch.segments[row].max() + 1):
                inside = batch.segments[row] == segment
                targets, weights = batch.targets[row][inside], batch.weights[row][inside]
                if prepared.tokenizer.encode("<|user|>")[0] not in targets:
                    continue
                seen += 1
                answer = prepared.tokenizer.decode(targets[weights == 1].tolist())
                assert answer.startswith("It is ") and targets[weights == 1][-1] == end
    assert seen > 20
    evaluation = prepared.evaluation("chat", 64, 4)
    total = sum(int(batch.weights.sum()) for batch, _ in evaluation)
    assert total == evaluation.tokens_d.sum() == prepared.counts["chat", "held_out"].tokens
    again = data.prepare(mixture, config, tmp_path / "again")
    assert again.fingerprint == prepared.fingerprint
    np.testing.assert_array_equal(
        batch.weights,
        again.loader(data.BatchShape(sequences=8, length=64), seed=0).batch(11).weights,
    )
