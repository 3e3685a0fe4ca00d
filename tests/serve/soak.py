"""A soak of the server: many requests of all kinds at once, among them clients that leave, bodies
that are too long or no JSON, unknown models, and stop strings within emoji and CJK.

    python tests/serve/soak.py --requests 2000

Every answer must be that of an engine alone; no request may hang; afterwards no page may be in use,
and memory must not have grown.
"""

import argparse
import asyncio
import gc
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from served_models import serving, tokenizer, wait_until_idle, write_run  # noqa: E402

import lm  # noqa: E402
from lm import model  # noqa: E402
from lm.data import Tokenizer, encode_prompt, end_of_turn  # noqa: E402
from lm.generate import Engine, Output, Request, Sampling  # noqa: E402
from lm.generate.text import Reader, begin  # noqa: E402
from lm.serve.router import Source  # noqa: E402
from lm.serve.variants import Reading  # noqa: E402

CONTEXT, MAX_BODY, HANGS = 256, 20_000, 120.0
PROMPTS = ("the cat", "猫は座る。", "", "🙂🚀 the ", "é ß ☃ on the mat", "日本語の文 " * 8)
AT_ONCE = 32


class Case(NamedTuple):
    """A request, and the (texts, finish reasons) that it must give."""

    path: str
    body: dict[str, Any]
    want: tuple[list[str], list[str]]


def cases(folders: dict[str, Path], count: int = 60) -> list[Case]:
    """Requests with the answers of engines that nobody else uses."""
    made, draw = [], random.Random(0)
    runs = {name: lm.load(folder) for name, folder in folders.items()}
    engines = {name: Engine(run.apply.cast(), context=CONTEXT) for name, run in runs.items()}
    for number in range(count):
        name, prompt = draw.choice(sorted(runs)), draw.choice(PROMPTS)
        words, is_chat = runs[name].tokenizer, number % 3 == 0
        seed, n, most = draw.randrange(100), draw.choice((1, 1, 2)), draw.randrange(1, 60)
        temperature = draw.choice((0.0, 1.0))
        if is_chat:
            text = f"<|user|>{prompt}<|end|><|assistant|>"
            ids, first, spaces = encode_prompt(text, words), None, 0
            ends, stops = end_of_turn(words)
            fields: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
        else:
            ids, first, spaces = begin(words, prompt)
            ends, stops, fields = words.stops, (), {"prompt": prompt}
        requests = (
            Request(
                prompt=ids,
                first_tokens=first,
                max_tokens=most,
                sampling=Sampling(temperature=temperature),
                seed=seed,
                index=index,
                stop_tokens=ends,
            )
            for index in range(n)
        )
        outputs = engines[name].generate(requests)
        # A stop string out of the text itself, from the middle of emoji and CJK words too.
        free, stop = texts(outputs, words, stops, spaces)[0][0], []
        wide = [i for i, char in enumerate(free) if ord(char) > 0x2000]
        if wide and number % 2:
            start = draw.choice(wide)
            stop = [free[start : start + draw.randrange(1, 4)], "🙂🙂🙂🙂", "never"]
        body = {"model": name, "seed": seed, "n": n, "max_tokens": most, **fields}
        body |= {"temperature": temperature} | ({"stop": stop} if stop else {})
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        made.append(Case(path, body, texts(outputs, words, [*stop, *stops], spaces)))
    return made


def texts(
    outputs: list[Output], words: Tokenizer, stops: Sequence[str], spaces: int
) -> tuple[list[str], list[str]]:
    """Texts and finish reasons of outputs of an engine."""
    found = []
    for output in outputs:
        reader = Reader(words, stops, spaces)
        reader.read(output)
        found.append(reader.result())
    ended = ["stop" if each.finished == "stop" else "length" for each in found]
    return [each.text for each in found], ended


class Soak:
    """Asks `count` times; `seen` counts kinds of requests, `wrong` holds what was not right."""

    def __init__(self, url: str, cases: list[Case], seed: int = 1):
        self._cases, self._draw, self._url = cases, random.Random(seed), url
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, count: int) -> None:
        """Asks, AT_ONCE at a time."""
        limits = httpx.Limits(max_connections=AT_ONCE)
        async with httpx.AsyncClient(base_url=self._url, timeout=HANGS, limits=limits) as web:
            numbers = iter(range(count))

            async def asks() -> None:
                for _ in numbers:
                    kind, case = self._draw.choice(KINDS), self._draw.choice(self._cases)
                    self.seen[kind] += 1
                    try:
                        async with asyncio.timeout(HANGS):
                            await getattr(self, f"_{kind}")(web, case)
                    except TimeoutError:
                        self.wrong.append(f"{kind} hangs: {case.body}")
                    except Exception as error:
                        self.wrong.append(f"{kind}: {error!r}")

            await asyncio.gather(*(asks() for _ in range(AT_ONCE)))

    async def _whole(self, web: httpx.AsyncClient, case: Case) -> None:
        response = await web.post(case.path, json=case.body)
        choices = response.json()["choices"]
        texts = [c["text"] if "text" in c else c["message"]["content"] for c in choices]
        self._compare(case, texts, [c["finish_reason"] for c in choices])

    async def _stream(self, web: httpx.AsyncClient, case: Case) -> None:
        texts, ended = [""] * case.body["n"], [None] * case.body["n"]
        body, lines = case.body | {"stream": True}, []
        async with web.stream("POST", case.path, json=body) as response:
            async for line in response.aiter_lines():
                if line:
                    lines.append(line.removeprefix("data: "))
        for line in lines[:-1]:
            (choice,) = json.loads(line)["choices"]
            index = choice["index"]
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            texts[index] += piece
            ended[index] = choice["finish_reason"]
        if lines[-1] != "[DONE]":
            self.wrong.append(f"the stream ends with {lines[-1]!r}")
        self._compare(case, texts, ended)

    def _compare(self, case: Case, texts: list[str], ended: list[Any]) -> None:
        if (texts, ended) != case.want:
            self.wrong.append(f"{case.body}: {(texts, ended)}, not {case.want}")

    async def _leaves(self, web: httpx.AsyncClient, case: Case) -> None:
        """Leaves after a random time, with or without a stream."""
        body = case.body | {"stream": self._draw.random() < 0.5, "max_tokens": 150}
        body.pop("stop", None)
        try:
            async with asyncio.timeout(self._draw.expovariate(20)):
                async with web.stream("POST", case.path, json=body) as response:
                    async for _ in response.aiter_bytes():
                        if self._draw.random() < 0.1:
                            return
        except TimeoutError:
            pass

    async def _refused(
        self, web: httpx.AsyncClient, status: int, case: Case, **content: Any
    ) -> None:
        response = await web.post(case.path, **content)
        is_error = set(response.json().get("error", ())) == {"message", "type", "param", "code"}
        if response.status_code != status or not is_error:
            self.wrong.append(f"{response.status_code}, not {status}: {response.text[:200]}")

    async def _unknown_model(self, web: httpx.AsyncClient, case: Case) -> None:
        await self._refused(web, 404, case, json=case.body | {"model": "other"})

    async def _unknown_field(self, web: httpx.AsyncClient, case: Case) -> None:
        await self._refused(web, 400, case, json=case.body | {"max_token": 3})

    async def _too_long(self, web: httpx.AsyncClient, case: Case) -> None:
        await self._refused(web, 413, case, json=case.body | {"user": "x" * (2 * MAX_BODY)})

    async def _long_prompt(self, web: httpx.AsyncClient, case: Case) -> None:
        prompt = "猫" * 1_000
        chat = {"messages": [{"role": "user", "content": prompt}]}
        new = chat if "messages" in case.body else {"prompt": prompt}
        await self._refused(web, 400, case, json=case.body | new)

    async def _no_json(self, web: httpx.AsyncClient, case: Case) -> None:
        body = json.dumps(case.body).encode()
        cut = body[: self._draw.randrange(len(body))]
        await self._refused(
            web, 400, case, content=cut, headers={"content-type": "application/json"}
        )


KINDS = ("whole",) * 6 + ("stream",) * 8 + ("leaves",) * 4
KINDS += ("unknown_model", "unknown_field", "too_long", "long_prompt", "no_json")


def folders(home: Path) -> dict[str, Path]:
    """A model and an adapter of it."""
    words = tokenizer()
    return {
        "one": write_run(home / "one", words, seed=1),
        "tuned": write_run(home / "tuned", words, seed=1, adapter=model.LoRA(rank=2)),
    }


def soak(served: dict[str, Path], count: int) -> dict[str, Any]:
    """Runs a soak; returns what was seen. Raises AssertionError for anything wrong."""
    known = cases(served)
    process = psutil.Process()
    with serving(
        Source("one", str(served["one"])),
        adapters=(Source("tuned", str(served["tuned"])),),
        reading=Reading(cache_tokens=3 * CONTEXT),  # so that sequences are preempted
        max_body=MAX_BODY,
    ) as server:
        first = Soak(server.url, known, seed=0)  # compiles what is left, fills caches
        asyncio.run(first.run(max(60, count // 5)))
        wait_until_idle(server)
        gc.collect()
        before, began = process.memory_info().rss, time.perf_counter()
        main = Soak(server.url, known)
        asyncio.run(main.run(count))
        seconds = time.perf_counter() - began
        wait_until_idle(server)
        gc.collect()
        grown = process.memory_info().rss - before
        wrong = first.wrong + main.wrong
        assert not wrong, "\n".join([f"{len(wrong)} wrong:", *wrong[:5]])
        assert server.service.active == 0
        assert not server.worker._sequences
        preempted = sum(stats.preempted for stats in server.worker.stats.values())
    return {
        "requests": count,
        "seconds": round(seconds, 1),
        "rss_before_mb": round(before / 1e6, 1),
        "rss_grown_mb": round(grown / 1e6, 1),
        "preempted": preempted,
        **dict(sorted(main.seen.items())),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        seen = soak(folders(Path(home)), options.requests)
    print(json.dumps(seen))
    assert seen["rss_grown_mb"] < 30, "memory has grown"
