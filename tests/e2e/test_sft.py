"""Pre-training on text, then supervised fine-tuning on conversations: the model answers in its chat
template."""

import json
from dataclasses import replace

import pytest
from tiny_experiments import config, experiment, texts

import lm
from lm import data, evals, optim, training
from lm.experiment import Stage
from lm.recipe import Recipe

ANSWERS = {"light": "a tree", "stone": "a river", "night": "one sky", "tree": "the light"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    records = [
        {"prompt": f"the {word} {i}", "completion": answer}
        for i in range(24)
        for word, answer in ANSWERS.items()
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    pretrain = experiment(
        name="pretrain",
        model=config(vocab=330, dim=32),
        tokenizer=data.SentencePiece(vocab=330, symbols=data.CHAT_SYMBOLS),
        data=data.Documents(texts=texts(), held_out=0.1),
        schedule=optim.Constant(peak=1e-2, steps=8),
        sample=None,
    )
    sft = replace(
        pretrain,
        name="sft",
        start=Stage("pretrain", optimizer="reset"),
        tokenizer=Stage("pretrain"),
        data=data.Chat(str(path), held_out=0.1),
        batch=data.BatchShape(sequences=8, length=32),
        schedule=optim.WSD(peak=2e-2, warmup=10, decay=0.5, steps=160),
        evals=(evals.Perplexity(every=160),),
        log=training.Log(every=20),
    )
    return Recipe(name="chatty", stages=(pretrain, sft))


@pytest.mark.slow
def test_a_fine_tuned_model_answers_in_its_template(recipe, tmp_path):
    run = lm.train(recipe, workdir=tmp_path)
    results = training.read_lines(run.folder / "eval.jsonl")
    losses = {line["step"]: line["value"] for line in results if line["name"] == "chat/loss"}
    assert losses[160] < 0.2 < 2 < losses[0], "begins at the loss of the stage before"
    lines = training.read_lines(run.folder / "metrics.jsonl")
    # Four or five tokens of each conversation have a loss, of about fifteen.
    assert all(line["weight"] < 0.6 * 8 * 32 for line in lines)
    trained = lm.load(run.folder)
    for word in ("stone", "night"):  # each in a conversation of its own, as in the data
        answer = trained.chat(temperature=0).say(f"the {word} 3", max_tokens=8)
        assert answer == ANSWERS[word]
