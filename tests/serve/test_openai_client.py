"""Every documented option, asked for with the official client. What the server answers equals what
an engine alone gives."""

import math
import re

import openai
import pytest
from served_models import CONTEXT, serving, tokenizer, wait_until_idle, write_run

import lm
from lm.data import encode_prompt, end_of_turn
from lm.generate import Engine, Request, Sampling
from lm.generate.text import Reader, begin
from lm.serve.router import Source

GREEDY = {"model": "one", "temperature": 0}
USER = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def run(folders):
    return lm.load(folders["one"])


@pytest.fixture(scope="module")
def engine(run):
    return Engine(run.apply.cast(), context=CONTEXT)


def alone(engine, words, prompt, stop=(), stop_tokens=None, first=None, spaces=0, **fields):
    """The text and the tokens of an engine that does nothing else."""
    fields = {"sampling": Sampling(temperature=0), "max_tokens": 16, **fields}
    ends = words.stops if stop_tokens is None else stop_tokens
    request = Request(prompt=prompt, first_tokens=first, stop_tokens=ends, **fields)
    (output,) = engine.generate([request])
    reader = Reader(words, stop, spaces)
    reader.read(output)
    return reader.result(), output


def test_models_are_listed_and_found(client):
    assert [each.id for each in client.models.list()] == ["one", "tuned"]
    found = client.models.retrieve("tuned")
    assert (found.id, found.parent, found.max_model_len) == ("tuned", "one", CONTEXT)
    with pytest.raises(openai.NotFoundError, match="Did you mean 'tuned'"):
        client.models.retrieve("tuneb")


@pytest.mark.parametrize("prompt", ["the cat", "", "猫は ", "🙂 the  "])
def test_completion_is_that_of_the_engine(client, run, engine, prompt):
    ids, first, spaces = begin(run.tokenizer, prompt)
    want, _ = alone(engine, run.tokenizer, ids, first=first, spaces=spaces)
    made = client.completions.create(prompt=prompt, **GREEDY)
    assert made.choices[0].text == want.text
    assert made.usage.completion_tokens == len(want.tokens)
    assert made.usage.prompt_tokens == len(ids)
    assert made.model == "one" and made.object == "text_completion"
    echoed = client.completions.create(prompt=prompt, echo=True, **GREEDY)
    assert echoed.choices[0].text == prompt + want.text


def test_prompts_of_tokens_and_several_prompts(client, run, engine):
    ids = run.tokenizer.encode("the mat")
    want = alone(engine, run.tokenizer, ids)[0].text
    assert client.completions.create(prompt=ids, **GREEDY).choices[0].text == want
    texts = ["the cat", "on the mat", "猫"]
    single = [client.completions.create(prompt=x, **GREEDY).choices[0].text for x in texts]
    made = client.completions.create(prompt=texts, **GREEDY)
    assert [choice.text for choice in made.choices] == single
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    made = client.completions.create(prompt=[ids, ids[:2]], n=2, **GREEDY)
    assert [choice.text for choice in made.choices[:2]] == [want, want]


SAMPLING = [
    ({"temperature": 1.3}, {"temperature": 1.3}),
    ({"top_p": 0.6}, {"temperature": 1.0, "top_p": 0.6}),
    ({"extra_body": {"top_k": 7}}, {"temperature": 1.0, "top_k": 7}),
    ({"extra_body": {"min_p": 0.1}}, {"temperature": 1.0, "min_p": 0.1}),
    (
        {"temperature": 0, "extra_body": {"repetition_penalty": 1.5}},
        {"temperature": 0, "repetition_penalty": 1.5},
    ),
]


@pytest.mark.parametrize(("fields", "sampling"), SAMPLING)
def test_sampling_options_reach_the_engine(client, run, engine, fields, sampling):
    made = client.completions.create(model="one", prompt="the cat", n=2, seed=7, **fields)
    ids = begin(run.tokenizer, "the cat").ids
    for index, choice in enumerate(made.choices):
        options = {"sampling": Sampling(**sampling), "seed": 7, "index": index}
        assert choice.text == alone(engine, run.tokenizer, ids, **options)[0].text


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_penalties(client, run, engine, name):
    ids = begin(run.tokenizer, "the cat").ids
    want = alone(engine, run.tokenizer, ids, max_tokens=60, **{name: 2.0})[0].text
    fields = {"prompt": "the cat", "max_tokens": 60, **GREEDY}
    assert client.completions.create(**{name: 2.0}, **fields).choices[0].text == want
    assert client.completions.create(**fields).choices[0].text != want


def test_logit_bias_forbids_and_forces_tokens(client, run, engine):
    (cat,) = run.tokenizer.encode(" cat")[:1]
    fields = {"prompt": "the", "max_tokens": 5, "logprobs": 0, **GREEDY}
    made = client.completions.create(logit_bias={str(cat): 100}, **fields)
    assert set(made.choices[0].logprobs.tokens) == {run.tokenizer.decode([cat]) or " cat"}
    _, output = alone(engine, run.tokenizer, begin(run.tokenizer, "the").ids)
    bias = {str(output.tokens[0]): -100}
    free, biased = (
        client.completions.create(logit_bias=each, **fields).choices[0].logprobs.tokens[0]
        for each in ({}, bias)
    )
    assert biased != free


def test_seed_repeats_and_its_absence_varies(client):
    def draw(**fields):
        made = client.completions.create(model="one", prompt="the cat", max_tokens=24, **fields)
        return made.choices[0].text

    assert draw(seed=3) == draw(seed=3) != draw(seed=4)
    assert draw(seed=2**40) and draw(seed=-1)
    assert len({draw() for _ in range(4)}) > 1


def test_stop_strings_stop_tokens_and_ignoring_the_end(client, run, engine):
    fields = {"prompt": "the cat", "max_tokens": 40, **GREEDY}
    free = client.completions.create(**fields)
    text = free.choices[0].text
    stop = text[5:8]
    made = client.completions.create(stop=["never", stop], **fields)
    assert made.choices[0].text == text[: text.index(stop)]
    assert made.choices[0].finish_reason == "stop"
    assert made.usage.completion_tokens < free.usage.completion_tokens
    assert client.completions.create(stop=stop, **fields).choices == made.choices
    ids = alone(engine, run.tokenizer, begin(run.tokenizer, "the cat").ids)[1].tokens[3:4]
    made = client.completions.create(extra_body={"stop_token_ids": ids}, **fields)
    assert made.choices[0].finish_reason == "stop"
    end = {str(run.tokenizer.eos): 100}
    made = client.completions.create(logit_bias=end, **fields)
    assert (made.choices[0].finish_reason, made.usage.completion_tokens) == ("stop", 1)
    made = client.completions.create(logit_bias=end, extra_body={"ignore_eos": True}, **fields)
    assert (made.choices[0].finish_reason, made.usage.completion_tokens) == ("length", 40)


def test_max_tokens_and_the_end_of_the_context(client):
    made = client.completions.create(prompt="the cat", max_tokens=3, **GREEDY)
    assert (made.choices[0].finish_reason, made.usage.completion_tokens) == ("length", 3)
    endless = {"extra_body": {"ignore_eos": True}}
    made = client.completions.create(prompt="the cat", max_tokens=10_000, **GREEDY, **endless)
    assert made.choices[0].finish_reason == "length"
    assert made.usage.total_tokens == CONTEXT
    made = client.completions.create(prompt="the cat", max_tokens=0, echo=True, **GREEDY)
    assert made.choices[0].text == "the cat" and made.usage.completion_tokens == 0


def test_logprobs_of_completions(client, run, engine):
    ids = begin(run.tokenizer, "the cat").ids
    _, output = alone(engine, run.tokenizer, ids, logprobs=3, prompt_logprobs=True)
    made = client.completions.create(prompt="the cat", logprobs=3, echo=True, **GREEDY)
    choice, logged = made.choices[0], made.choices[0].logprobs
    want = [*output.prompt_logprobs, *output.logprobs]
    assert logged.token_logprobs[0] is None
    assert logged.token_logprobs[1:] == pytest.approx(want[1:], abs=1e-5)
    assert len(logged.tokens) == len(ids) + made.usage.completion_tokens
    best = [max(top.values()) for top in logged.top_logprobs[len(ids) :]]
    assert best == pytest.approx(output.logprobs, abs=1e-5)
    assert all(3 <= len(top) <= 4 for top in logged.top_logprobs[len(ids) :])
    # Whole characters stand where the offsets say.
    for token, offset in zip(logged.tokens, logged.text_offset):
        if not token.startswith(("bytes:", "<")):
            assert choice.text[offset:].startswith(token), (token, offset)
    plain = client.completions.create(prompt="the cat", logprobs=0, **GREEDY).choices[0].logprobs
    assert plain.tokens == logged.tokens[len(ids) :]
    assert [list(top) for top in plain.top_logprobs] == [[token] for token in plain.tokens]


def test_best_of_returns_the_most_probable(client):
    fields = {"model": "one", "prompt": "the", "seed": 5, "logprobs": 0, "max_tokens": 6}

    def means(made):
        return [sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens) for c in made.choices]

    every = client.completions.create(n=4, **fields)
    best = client.completions.create(n=2, best_of=4, **fields)
    assert means(best) == sorted(means(every), reverse=True)[:2]
    assert best.usage.completion_tokens == every.usage.completion_tokens
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(best_of=4, stream=True, **fields)


STREAMED = [
    {},
    {"n": 3, "temperature": 1.2, "seed": 9},
    {"logprobs": 2, "echo": True},
    {"stop": ["猫", "at", "👩‍👩‍👧"], "logprobs": 0},
    {"prompt": ["the cat", "猫は "], "n": 2, "temperature": 0.9, "seed": 1, "echo": True},
    {"max_tokens": 0, "echo": True},
]


@pytest.mark.parametrize("fields", STREAMED)
def test_streamed_completions_concatenate_to_the_whole(client, fields):
    fields = {"prompt": "the cat", "max_tokens": 30, **GREEDY, **fields}
    whole = client.completions.create(**fields)
    texts, finish, logged, used = {}, {}, {}, None
    options = {"include_usage": True}
    for chunk in client.completions.create(stream=True, stream_options=options, **fields):
        used = chunk.usage or used
        assert bool(chunk.usage) != bool(chunk.choices)
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            assert finish.setdefault(choice.index, None) is None
            finish[choice.index] = choice.finish_reason
            if choice.logprobs:
                logged.setdefault(choice.index, []).append(choice.logprobs)
    assert used.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert finish[choice.index] == choice.finish_reason
        for name in ("tokens", "token_logprobs", "text_offset") if choice.logprobs else ():
            joined = [x for part in logged[choice.index] for x in getattr(part, name)]
            assert joined == getattr(choice.logprobs, name)


def test_chat_is_that_of_the_engine(client, run, engine):
    messages = [{"role": "developer", "content": "Be brief."}, *USER]
    text = "<|system|>Be brief.<|end|><|user|>the cat<|end|><|assistant|>"
    ends, stops = end_of_turn(run.tokenizer)
    ids = encode_prompt(text, run.tokenizer)
    options = {"stop": stops, "stop_tokens": ends, "max_tokens": CONTEXT}
    want, _ = alone(engine, run.tokenizer, ids, logprobs=2, **options)
    made = client.chat.completions.create(
        messages=messages, logprobs=True, top_logprobs=2, **GREEDY
    )
    choice = made.choices[0]
    assert choice.message.content == want.text and choice.message.role == "assistant"
    assert choice.finish_reason == ("stop" if want.finished == "stop" else "length")
    assert made.usage.prompt_tokens == len(ids)
    logged = choice.logprobs.content
    assert len(logged) == made.usage.completion_tokens == len(want.tokens)
    assert [each.logprob for each in logged] == pytest.approx(want.logprobs, abs=1e-5)
    assert all(len(each.top_logprobs) == 2 for each in logged)
    spelled = b"".join(bytes(each.bytes) for each in logged)
    assert spelled.decode(errors="replace").startswith(want.text)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "temperature": 1.0, "seed": 3, "logprobs": True, "top_logprobs": 1},
        {"stop": ["猫", "mat"], "logprobs": True},
        {"max_completion_tokens": 4},
        {"max_tokens": 5, "max_completion_tokens": 9},
    ],
)
def test_streamed_chats_concatenate_to_the_whole(client, fields):
    fields = {"messages": USER, **GREEDY, **fields}
    whole = client.chat.completions.create(**fields)
    texts, roles, finish, logged = {}, {}, {}, {}
    for chunk in client.chat.completions.create(stream=True, **fields):
        assert "usage" not in chunk.model_fields_set
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            roles.setdefault(choice.index, choice.delta.role)
            finish[choice.index] = choice.finish_reason
            logged.setdefault(choice.index, []).extend(
                choice.logprobs.content if choice.logprobs else []
            )
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert roles[choice.index] == "assistant"
        assert finish[choice.index] == choice.finish_reason
        if choice.logprobs:
            assert logged[choice.index] == choice.logprobs.content


def test_contents_of_parts_and_earlier_answers(client):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    whole = client.chat.completions.create(messages=USER, max_tokens=6, **GREEDY)
    made = client.chat.completions.create(
        messages=[{"role": "user", "content": parts}], max_tokens=6, **GREEDY
    )
    assert made.choices[0].message.content == whole.choices[0].message.content
    again = [*USER, whole.choices[0].message.model_dump(), *USER]
    assert client.chat.completions.create(messages=again, max_tokens=2, **GREEDY).choices


def test_fields_that_change_nothing_are_accepted(client):
    made = client.chat.completions.create(
        messages=USER,
        max_tokens=2,
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        prompt_cache_key="k",
        user="someone",
        safety_identifier="someone",
        parallel_tool_calls=True,
        modalities=["text"],
        **GREEDY,
    )
    assert made.choices


def test_cached_tokens_are_reported(client):
    fields = {"prompt": "猫は座る。" * 12, "max_tokens": 1, **GREEDY}
    client.completions.create(**fields)
    made = client.completions.create(**fields)
    assert 0 < made.usage.prompt_tokens_details.cached_tokens < made.usage.prompt_tokens


# Structured output

SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["big", "small"]}, "cat": {"type": "boolean"}},
    "required": ["size", "cat"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(client, stream):
    import json

    wanted = {"type": "json_schema", "json_schema": {"name": "cat", "schema": SCHEMA}}
    fields = {"messages": USER, "response_format": wanted, "temperature": 1.0, "model": "one"}
    for seed in range(3):
        made = client.chat.completions.create(stream=stream, seed=seed, max_tokens=100, **fields)
        if stream:
            text = "".join(c.choices[0].delta.content or "" for c in made)
        else:
            text = made.choices[0].message.content
        value = json.loads(text)
        assert value["size"] in ("big", "small") and isinstance(value["cat"], bool)


def test_other_guides(client):
    def text(prompt="the cat ", **fields):
        made = client.completions.create(model="one", prompt=prompt, max_tokens=60, **fields)
        return made.choices[0].text

    assert text(extra_body={"response_format": {"type": "text"}}, seed=1) == text(seed=1)
    assert text(extra_body={"response_format": {"type": "json_object"}}, seed=1).startswith("{")
    for guide, pattern in (
        ({"regex": "(cat|mat){2}"}, "(cat|mat){2}"),
        ({"choice": ["猫", "🚀x"]}, "猫|🚀x"),
        ({"grammar": 'start: "a" b\nb: "c"'}, "ac"),
        ({"json": {"type": "boolean"}}, "true|false"),
    ):
        made = text(extra_body={"structured_outputs": guide})
        assert re.fullmatch(pattern, made), made


def test_a_turn_may_end_where_its_guide_is_complete(client, run):
    (end,) = run.tokenizer.encode("<|end|>")
    made = client.chat.completions.create(
        model="one",
        messages=USER,
        max_tokens=60,
        logit_bias={str(end): 100},
        extra_body={"structured_outputs": {"regex": "(cat)+"}},
    )
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == ("cat", "stop")


def test_a_bad_schema_is_refused(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "cat"}}}
    with pytest.raises(openai.BadRequestError, match="JSON schema"):
        client.chat.completions.create(messages=USER, response_format=wanted, **GREEDY)


# Adapters


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_an_adapter_gives_the_text_of_its_own_run(client, folders, temperature):
    tuned = lm.load(folders["tuned"])
    engine = Engine(tuned.apply.cast(), context=CONTEXT)
    ids = begin(tuned.tokenizer, "the cat").ids
    options = {"sampling": Sampling(temperature=temperature), "seed": 4}
    want = alone(engine, tuned.tokenizer, ids, **options)[0].text
    fields = {"prompt": "the cat", "seed": 4, "temperature": temperature}
    assert client.completions.create(model="tuned", **fields).choices[0].text == want
    assert client.completions.create(model="one", **fields).choices[0].text != want


def test_adapters_share_the_arrays_of_the_base(server):
    import jax

    one, tuned = (server.worker.variants[name].engine.model.params for name in ("one", "tuned"))
    base = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(one)}
    own = {k: x for k, x in tuned.items() if k != "adapter"}
    assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(own)} == base


# Concurrency


def test_concurrent_requests_do_not_change_each_other(server, client):
    import concurrent.futures

    def ask(i):
        made = client.completions.create(
            model=("one", "tuned")[i % 2], prompt=f"the cat {i % 8}", seed=i % 8, max_tokens=20
        )
        return made.choices[0].text

    one_by_one = [ask(i) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(32)))
    assert together == one_by_one * 4
    wait_until_idle(server)


def test_no_chat_template(tmp_path):
    words = tokenizer()
    folder = write_run(tmp_path / "plain", words, seed=1)
    import tiny_experiments

    from lm.data import SentencePiece

    SentencePiece(vocab=320).train(tiny_experiments.texts()).save(folder)
    said = []
    with (
        serving(Source("plain", str(folder)), say=said.append) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        assert client.completions.create(model="plain", prompt="the", max_tokens=2).choices
        with pytest.raises(openai.BadRequestError, match="no chat template.*v1/completions"):
            client.chat.completions.create(model="plain", messages=USER)
    assert any("no chat template" in line for line in said)
    assert math.isfinite(server.settings.grace)
