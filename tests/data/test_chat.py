"""Conversations are read from the common shapes, rendered by the chat template, and have their loss
on what the assistant writes, with the token that ends it."""

import json

import numpy as np
import pytest
import tokenizers
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


@pytest.fixture(scope="module")
def own():
    """A SentencePiece tokenizer trained here."""
    return data.SentencePiece(vocab=420, symbols=data.CHAT_SYMBOLS).train(documents(30))


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def encoded(source, tokenizer):
    return [each[:3] for each in source.encode(list(source.documents()), tokenizer)]


def trained(tokenizer, ids, weights):
    """The runs of tokens with a loss, as text; special tokens as their pieces."""
    runs, run = [], ""
    for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        if weight:
            run += tokenizer.decode([token]) or tokenizer.piece(token)
        elif run:
            runs, run = [*runs, run], ""
    return [*runs, run] if run else runs


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


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_generation_is_the_beginning_of_the_training_text(name, imported):
    """Token by token: what the model sees before an answer is what it saw in training, and the
    loss begins right there."""
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<b>", "eos_token": "<e>"})
    text, spans = template.spans(MESSAGES)
    ids, weights = data.encode_spans(text, spans, imported)
    prompt = imported.encode(template.render(MESSAGES[:3], add_generation_prompt=True))
    prompt = prompt if prompt[:1] == [imported.bos] else [imported.bos, *prompt]
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
