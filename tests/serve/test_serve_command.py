"""`python -m lm serve` as a process: what it prints, and how it ends."""

import importlib.util
import json
import signal
import subprocess
import sys

import httpx
import pytest

from lm.main import lm_main

LONG = {"prompt": "the cat", "max_tokens": 200, "ignore_eos": True, "stream": True}


class Process:
    """A server; `lines` are those that it has printed."""

    def __init__(self, *options):
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "lm", "serve", "--port", "0", *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines = []

    def wait_for(self, words):
        """The rest of the first line with these words."""
        for line in self.popen.stdout:
            self.lines.append(line.rstrip())
            if words in line:
                return line.partition(words)[2].strip()
        raise AssertionError((self.lines, self.popen.stderr.read()))

    def end(self, seconds=60):
        """(exit code, stderr)"""
        out, err = self.popen.communicate(timeout=seconds)
        self.lines += out.splitlines()
        return self.popen.returncode, err


@pytest.fixture
def start():
    started = []

    def make(*options):
        started.append(Process(*options))
        return started[-1]

    yield make
    for each in started:
        each.popen.kill()
        each.popen.communicate()


def test_sigterm_lets_running_requests_end(start, folders):
    process = start(f"A={folders['one']}:0.5", f"B={folders['two']}:0.5")
    url = process.wait_for("ready:")
    assert any(line.startswith("A: ") and "pages of" in line for line in process.lines)
    assert any(line.startswith("listening at http://127.0.0.1:") for line in process.lines)
    root = url.removesuffix("/v1")
    assert httpx.get(f"{root}/ready").status_code == 200
    with (
        httpx.Client(timeout=60) as web,
        web.stream("POST", f"{url}/completions", json=LONG | {"n": 8}) as streamed,
    ):
        lines = streamed.iter_lines()
        next(lines)
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for("shutting down")
        # It still listens, so that a load balancer can see that it is not ready.
        assert httpx.get(f"{root}/ready").status_code == 503
        refused = httpx.post(f"{url}/completions", json=LONG)
        assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    ended = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in events[:-1]]
    assert ended.count("length") == 8
    code, err = process.end()
    assert (code, err) == (143, "")
    assert process.lines[-1] == "stopped"


@pytest.mark.slow
def test_ctrl_c_and_the_end_of_the_grace_period(start, folders):
    process = start(folders["one"], "--grace", "0.2", "--context", 40_000)
    url = process.wait_for("ready:")
    body = LONG | {"n": 16, "max_tokens": 30_000}
    with (
        httpx.Client(timeout=60) as web,
        web.stream("POST", f"{url}/completions", json=body) as streamed,
    ):
        lines = streamed.iter_lines()
        next(lines)
        process.popen.send_signal(signal.SIGINT)
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert "shutting down" in json.loads(events[-2][6:])["error"]["message"]
    code, err = process.end()
    assert (code, err) == (130, "")


def test_errors_are_one_sentence(folders, tmp_path, capsys):
    for options, words in (
        ([tmp_path], "neither a run folder"),
        ([folders["one"], "--host", "300.1.1.1"], "--host=300.1.1.1 is no address"),
        ([folders["one"], "--context", "0"], "whole number"),
        ([folders["one"], f"A={folders['one']}:0.5"], "every run a weight"),
        ([folders["one"], "--adapter", f"x={folders['two']}"], "has no adapter"),
        ([folders["one"], "--cache-dtype", "int3"], "cache_dtype='int3'"),
    ):
        with pytest.raises(SystemExit) as ended:
            lm_main(["serve", "--port", "0", *map(str, options)])
        err = capsys.readouterr().err
        assert ended.value.code == 2 and words in err, err
        assert len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_missing_packages_are_one_sentence(monkeypatch, folders, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        lm_main(["serve", str(folders["one"])])
    assert ended.value.code == 2
    assert 'needs fastapi, uvicorn, prometheus_client: pip install -e ".[serve]"' in (
        capsys.readouterr().err
    )
