"""What is printed when training ends: held-out results and the next commands."""

import json
from types import SimpleNamespace

import pytest
from etils import epath
from tiny_experiments import config, experiment

from lm import data, objectives, summary

REWARD_MODEL = {
    "model": config(head="scalar"),
    "objective": objectives.RewardModel(),
    "data": data.Preferences("pairs.jsonl"),
    "batch": data.BatchShape(sequences=4, length=32, packing=data.Pairs()),
    "evals": (),
}


class Prepared:
    """Held-out data of two sources: whole texts, and conversations with a loss on answers."""

    held_out = ("web", "chat")

    def stream(self, name, split):
        return SimpleNamespace(has_weights=name == "chat")

    def texts(self, name):
        return ["a" * 1000]


def run(folder, template="{{ messages }}", **fields):
    ids = dict.fromkeys(("bos", "eos", "pad", "unk"), -1)
    return SimpleNamespace(
        folder=epath.Path(folder),
        step=8,
        experiment=experiment(**fields),
        tokenizer=SimpleNamespace(chat_template=template, symbols=(), **ids),
    )


def line(name, value, stderr=0.01, step=8):
    return {"step": step, "name": name, "value": value, "stderr": stderr, "count": 9}


def held_out(folder, *lines):
    (folder / "eval.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    return summary._held_out(run(folder), Prepared())


def test_text_is_compared_with_xz_and_answers_are_not(tmp_path):
    lines = [
        line(f"{source}/{measure}", value)
        for source in ("web", "chat")
        for measure, value in (("loss", 2.0), ("perplexity", 7.4), ("bits_per_byte", 1.5))
    ]
    first, xz, second = held_out(tmp_path, line("web/loss", 9.0, step=4), *lines)
    assert first == "Held out    1.5000 ± 0.0100 bits per byte (web)"
    assert xz.startswith("            0.") and xz.endswith(" by xz -9")
    assert second == "Held out    1.5000 ± 0.0100 bits per byte of answers (chat)"


def test_metrics_of_pairs_and_of_a_users_evaluation_are_printed(tmp_path):
    assert held_out(
        tmp_path,
        line("chat/loss", 0.5),
        line("chat/chosen_reward", -0.25),
        line("chat/margin", None),  # not finite
        line("greedy/length", 12.0, stderr=None),
    ) == [
        "Held out    0.5000 ± 0.0100 loss (chat)",
        "            -0.2500 ± 0.0100 chosen reward (chat)",
        "Held out    12.0000 length (greedy)",
    ]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ["generate", "eval"]),
        ({"data": data.Chat("chats.jsonl")}, ["chat", "eval"]),
        ({"data": data.Chat("chats.jsonl"), "template": None}, ["generate", "eval"]),
        (
            {"data": data.Mixture(sources={"pairs": data.Preferences("pairs.jsonl")})},
            ["chat", "eval"],
        ),
        (REWARD_MODEL, []),
    ],
    ids=["text", "chat", "no template", "mixture", "reward model"],
)
def test_next_commands_fit_the_model(tmp_path, fields, words):
    *commands, longer = summary._next_commands(run(tmp_path, **fields), "dpo.")
    assert [command.split()[:5] for command in commands] == [
        ["python", "-m", "lm", word, str(tmp_path)] for word in words
    ]
    assert "--set dpo.schedule.steps=16" in longer
