"""Errors have OpenAI's shape, the right status, and name the field; limits hold; a client that
leaves frees its pages; an engine that fails is made anew."""

import asyncio
import concurrent.futures
import json
import socket
import threading

import httpx
import openai
import pytest
from served_models import CONTEXT, serving, wait_until_idle

from lm.errors import UserError
from lm.serve.router import Source

COMPLETION = {"model": "one", "prompt": "the cat", "max_tokens": 4}
CHAT = {"model": "one", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4}
LONG = {**COMPLETION, "max_tokens": 100, "ignore_eos": True}


@pytest.fixture(scope="module")
def web(server):
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


def error(response, status, param=None):
    """The message of an error; checks its shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and "\n" not in body["error"]["message"]
    assert "Traceback" not in response.text
    if param is not None:
        assert body["error"]["param"] == param
    return body["error"]["message"]


BAD = [
    ({"prompt": None}, "prompt", "missing"),
    ({"prompt": 5}, "prompt", "token ids"),
    ({"prompt": []}, "prompt", "token ids"),
    ({"prompt": [[]]}, "prompt", "token ids"),
    ({"prompt": ["a", 3]}, "prompt", "token ids"),
    ({"prompt": [3, -1]}, "prompt", "token ids"),
    ({"prompt": [3, True]}, "prompt", "token ids"),
    ({"prompt": [10**6]}, "prompt", "vocabulary ends at"),
    ({"prompt": "the " * 300}, "prompt", f"context of one ends at {CONTEXT}"),
    ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"max_tokens": "5"}, "max_tokens", "valid integer"),
    ({"max_tokens": 2**40}, "max_tokens", "less than"),
    ({"temperature": -1}, "temperature", "greater than"),
    ({"temperature": "hot"}, "temperature", "'hot'"),
    ({"top_p": 1.5}, "top_p", "less than"),
    ({"n": 0}, "n", "greater than"),
    ({"n": 1000}, "n", "less than"),
    ({"n": 2, "best_of": 1}, "best_of", "at least n"),
    ({"stop": ""}, "stop", "none of them empty"),
    ({"stop": ["a"] * 100}, "stop", "at most"),
    ({"stop": 3}, "stop", "list of texts"),
    ({"logprobs": 100}, "logprobs", "less than"),
    ({"logit_bias": {"cat": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"3": 1000}}, "logit_bias.3", "less than"),
    ({"logit_bias": {"99999": 1}}, None, "vocabulary ends at"),
    ({"seed": 1.5}, "seed", "valid integer"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"stream_options": {"usage": True}}, "stream_options.usage", "not known"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"max_token": 5}, "max_token", "Did you mean 'max_tokens'"),
    ({"messages": []}, "messages", "not known"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0", "greater than"),
    ({"structured_outputs": {}}, None, "one of json, regex"),
    ({"structured_outputs": {"regex": "("}}, None, "regular expression"),
    ({"structured_outputs": {"choice": []}}, None, "at least one"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, None, "json_schema is missing"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD)
def test_bad_completions_are_refused(web, fields, param, words):
    assert words in error(web.post("/v1/completions", json=COMPLETION | fields), 400, param)


def user(content):
    return {"role": "user", "content": content}


BAD_CHATS = [
    ({"messages": []}, "messages", "at least one"),
    ({"messages": "hello"}, "messages", "list of messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "assistant, tool"),
    ({"messages": [user("x"), user(None)]}, "messages.1.content", "must be text"),
    ({"messages": [user(3)]}, "messages.0.content", "must be text"),
    (
        {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]},
        "messages.0.content",
        "parts of type 'text'",
    ),
    ({"messages": [user("the " * 300)]}, "messages", f"ends at {CONTEXT}"),
    ({"max_tokens": 0}, "max_tokens", "greater than"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"logprobs": 3}, "logprobs", "valid boolean"),
    ({"modalities": ["audio"]}, "modalities.0", "'text'"),
    ({"functions": []}, "functions", "use tools"),
    ({"tools": [{"type": "function"}]}, "tools.0.function", "missing"),
    ({"tool_choice": "required"}, "tool_choice", "cannot be required"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "no place for tools"),
    ({"best_of": 2}, "best_of", "not known"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD_CHATS)
def test_bad_chats_are_refused(web, fields, param, words):
    assert words in error(web.post("/v1/chat/completions", json=CHAT | fields), 400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"temperature": NaN}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"max_tokens": ' + b"9" * 100_000 + b"}",
    ],
    ids=range(11),
)
def test_bodies_that_are_no_requests(web, body):
    headers = {"content-type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions"):
        error(web.post(path, content=body, headers=headers), 400)


def test_other_paths_methods_and_types(web):
    error(web.get("/v1/nothing"), 404)
    error(web.get("/docs"), 404)
    error(web.get("/v1/completions"), 405)
    error(web.post("/v1/completions", data={"prompt": "x"}), 415)
    error(web.post("/v1/completions", content="{}", headers={"content-type": "text/plain"}), 415)
    assert "model='three' is not known" in error(
        web.post("/v1/completions", json=COMPLETION | {"model": "three"}), 404, "model"
    )
    assert error(web.get("/v1/models/three"), 404)
    nameless = {k: x for k, x in COMPLETION.items() if k != "model"}
    assert web.post("/v1/completions", json=nameless).json()["model"] == "one"


def test_health_readiness_page_and_metrics(server, web, monkeypatch, tmp_path):
    from lm.serve import app

    assert web.get("/health").status_code == web.get("/ready").status_code == 200
    monkeypatch.setattr(app, "PAGE", tmp_path / "index.html")
    error(web.get("/"), 404)
    (tmp_path / "index.html").write_text("<p>☃")
    page = web.get("/")
    assert (page.text, page.headers["content-type"]) == ("<p>☃", "text/html; charset=utf-8")
    names = '{model="tuned",variant="tuned"}'

    def counts():
        lines = web.get("/metrics").text.splitlines()
        return {k: float(x) for k, x in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = counts()
    fields = COMPLETION | {"model": "tuned", "ignore_eos": True, "n": 2}
    tokens = web.post("/v1/completions", json=fields).json()["usage"]["prompt_tokens"]
    wait_until_idle(server)
    new = {name: value - before.get(name, 0) for name, value in counts().items()}
    finished = '{finish_reason="length",model="tuned",variant="tuned"}'
    assert new[f"lm_requests_total{finished}"] == 2
    assert new[f"lm_generation_tokens_total{names}"] == 8
    assert new[f"lm_prompt_tokens_total{names}"] == tokens
    assert new[f"lm_time_to_first_token_seconds_count{names}"] == 2
    assert new[f"lm_time_per_output_token_seconds_count{names}"] == 2
    assert new['lm_http_responses_total{path="/v1/completions",status="200"}'] == 1
    assert counts()['lm_cache_pages_used{variant="tuned"}'] == 0
    (pool,) = server.worker.variants["tuned"].engine.scheduler.pools.values()
    assert counts()['lm_cache_pages{variant="tuned"}'] == pool.count


# Clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_pages(server, stream):
    """It leaves in the middle of an answer that would go on for long."""
    engine = server.worker.variants["one"].engine
    held, left, original = threading.Event(), threading.Event(), engine.step

    def step():
        if engine.scheduler.running and len(engine.scheduler.running[0].tokens) > 20:
            held.set()
            left.wait(30)
        return original()

    engine.step = step
    try:
        body = json.dumps({**LONG, "n": 3, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            assert held.wait(30)
        idle = asyncio.run_coroutine_threadsafe(server.service.idle.wait(), server.loop)
        assert idle.result(30)
        jobs = list(engine.scheduler.running)
        left.set()
        wait_until_idle(server)
        assert [job.result.finished for job in jobs] == ["ended"] * 3
    finally:
        left.set()
        del engine.step


def test_a_client_that_leaves_within_its_body(server):
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 100\r\n\r\n{"prompt": '
        )
    idle = asyncio.run_coroutine_threadsafe(server.service.idle.wait(), server.loop)
    assert idle.result(30)
    wait_until_idle(server)


# Limits


def test_an_engine_that_fails_is_made_anew(server, web, capsys):
    variant = server.worker.variants["one"]
    broken = variant.engine

    def fail():
        raise RuntimeError("made up")

    broken.step = fail
    assert "failed at this request" in error(web.post("/v1/completions", json=COMPLETION), 500)
    assert "made up" in capsys.readouterr().err
    want = web.post("/v1/completions", json=COMPLETION | {"temperature": 0}).json()
    assert variant.engine is not broken and want["choices"][0]["text"]
    wait_until_idle(server)


def test_a_stream_that_fails_ends_with_the_error(server, client):
    engine = server.worker.variants["one"].engine
    original, steps = engine.step, []

    def step():
        steps.append(1)
        if len(steps) > 5:
            raise RuntimeError("made up")
        return original()

    engine.step = step
    pieces = []
    with pytest.raises(openai.APIError, match="failed at this request"):
        for chunk in client.completions.create(
            model="one", prompt="the cat", stream=True, max_tokens=50, logprobs=0, temperature=0
        ):
            pieces.append(chunk)
    assert pieces
    wait_until_idle(server)


def test_limits_of_body_queue_and_time(folders, capsys):
    source = Source("one", str(folders["one"]))
    with (
        serving(source, max_body=2_000, max_queue=4, timeout=3.0, keys=["k1", "k2"]) as server,
        httpx.Client(base_url=server.url, timeout=60) as web,
    ):
        key = {"authorization": "Bearer k2"}
        for headers in ({}, {"authorization": "Bearer k3"}, {"authorization": "Basic k1"}):
            error(web.get("/v1/models", headers=headers), 401)
            error(web.post("/v1/completions", json=COMPLETION, headers=headers), 401)
        assert web.get("/health").status_code == 200
        assert web.get("/v1/models", headers={"authorization": "bearer k1"}).status_code == 200
        web.headers.update(key)
        for size in (3_000, 3_000_000):
            big = COMPLETION | {"prompt": "x" * size}
            assert "2,000 bytes" in error(web.post("/v1/completions", json=big), 413)
        # Nothing is computed until `go`.
        engine, go = server.worker.variants["one"].engine, threading.Event()
        original = engine.step
        engine.step = lambda: go.wait(60) and original()
        assert "queue holds 4" in error(web.post("/v1/completions", json=LONG | {"n": 5}), 400)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            late = pool.submit(web.post, "/v1/completions", json=LONG | {"n": 3})
            while server.worker.waiting < 3:
                threading.Event().wait(0.01)
            full = web.post("/v1/completions", json=LONG | {"n": 2})
            assert "queue is full" in error(full, 429) and full.headers["retry-after"]
            slow = late.result(30)
            assert "longer than 3 s" in error(slow, 504)
            assert slow.headers["x-should-retry"] == "false"
        go.set()
        wait_until_idle(server)
        slow_steps = threading.Event()
        engine.step = lambda: (slow_steps.wait(0.2), original())[1]
        with web.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as streamed:
            lines = [line for line in streamed.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and "longer than 3 s" in lines[-2]
        del engine.step
        wait_until_idle(server)
        assert web.post("/v1/completions", json=COMPLETION).status_code == 200


# Beginning


def test_ports_and_folders_that_cannot_be_used(server, folders, tmp_path):
    from lm.serve.server import Server, Settings

    source = Source("one", str(folders["one"]))

    def settings(**fields):
        return Settings(**{"sources": [source], "adapters": [], "port": 0} | fields)

    with pytest.raises(UserError, match=r"--port=\d+ .* cannot be used .*another port"):
        Server(settings(port=server.port))
    with pytest.raises(UserError, match="--host=nowhere.invalid is no address"):
        Server(settings(host="nowhere.invalid"))
    other = Source("other", str(tmp_path))
    for bad, words in (
        (settings(sources=[other]), "neither a run folder"),
        (settings(adapters=[other]), "neither a run folder"),
        (settings(adapters=[source._replace(name="a")]), "has no adapter"),
        (
            settings(
                sources=[Source("two", str(folders["two"]))],
                adapters=[Source("tuned", str(folders["tuned"]))],
            ),
            "for other weights",
        ),
    ):
        with pytest.raises(UserError, match=words):
            Server(bad).run()
