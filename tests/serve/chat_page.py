"""A server with OpenAI's API that answers as a test says, and the chat page as a reader uses it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lm

PAGE = Path(lm.__file__).parent / "serve" / "page" / "index.html"
MODELS = ("small", "large")
MILLISECONDS = 5_000  # a step of a test takes 50; more is a hang


@dataclass(kw_only=True)
class Answer:
    """What the server streams to one request: `pieces` of text, then usage and [DONE].

    With `stepwise` each piece waits for FakeApi.release(). `status` and `message` make an error;
    `breaks` closes the connection after the pieces; `fails` sends an error within the stream.
    """

    pieces: tuple[str, ...] = ("Fine", ", thanks", ".")
    stepwise: bool = False
    finish_reason: str = "stop"
    status: int = 200
    message: str = ""
    breaks: bool = False
    fails: str = ""


@dataclass
class FakeApi:
    """Answers requests with `answers` in turn, then with Answer(); keeps their bodies."""

    address: str = ""
    key: str = ""
    answers: list[Answer] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    pieces: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    disconnected: threading.Event = field(default_factory=threading.Event)

    def release(self, count: int = 1) -> None:
        self.pieces.release(count)


class Handler(BaseHTTPRequestHandler):
    owner: FakeApi  # set by a subclass per server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/":
            self.reply(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/v1/models" and self.is_allowed():
            data = [{"id": name, "object": "model"} for name in MODELS]
            self.reply(200, json.dumps({"object": "list", "data": data}).encode())
        elif self.path != "/v1/models":
            self.refuse(404, f"There is no {self.path}.")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.is_allowed():
            return
        self.owner.bodies.append(body)
        answer = self.owner.answers.pop(0) if self.owner.answers else Answer()
        if answer.status != 200:
            self.refuse(answer.status, answer.message)
            return
        try:
            self.stream(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.owner.disconnected.set()

    def stream(self, answer: Answer) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()  # HTTP/1.0: the end of the connection ends the body
        for piece in answer.pieces:
            if answer.stepwise:
                while not self.owner.pieces.acquire(timeout=0.01):
                    self.write(": waiting\n\n")  # a comment, which finds a closed connection
            self.event({"choices": [{"index": 0, "delta": {"content": piece}}]})
        if answer.breaks:
            return
        if answer.fails:
            self.event({"error": {"message": answer.fails}})
            return
        last = {"index": 0, "delta": {}, "finish_reason": answer.finish_reason}
        self.event({"choices": [last]})
        self.event({"choices": [], "usage": {"completion_tokens": 40}})
        self.write("data: [DONE]\n\n")

    def event(self, value: dict[str, Any]) -> None:
        self.write(f"data: {json.dumps(value)}\r\n\r\n")

    def write(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()

    def is_allowed(self) -> bool:
        key = self.owner.key
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            self.refuse(401, "Incorrect API key provided.")
            return False
        return True

    def refuse(self, status: int, message: str) -> None:
        self.reply(status, json.dumps({"error": {"message": message, "code": status}}).encode())

    def reply(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving_fake(api: FakeApi, port: int = 0) -> Iterator[FakeApi]:
    http = ThreadingHTTPServer(
        ("127.0.0.1", port), type("OwnedHandler", (Handler,), {"owner": api})
    )
    api.address = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield api
    finally:
        api.release(1000)
        http.shutdown()
        http.server_close()


class Chat:
    """What a reader does and sees."""

    def __init__(self, page) -> None:
        from playwright.sync_api import expect

        expect.set_options(timeout=MILLISECONDS)
        self.page = page
        self.expect = expect
        self.message = page.get_by_role("textbox", name="Message", exact=True)
        self.answers = page.locator("article.assistant")
        self.questions = page.locator("article.user")

    def send(self, text: str) -> None:
        self.message.fill(text)
        self.message.press("Enter")

    def ask(self, text: str, answer: str = "Fine, thanks.") -> None:
        """Sends and waits for the end of the answer."""
        self.send(text)
        self.finishes(answer)

    def finishes(self, answer: str) -> None:
        self.reads(answer)
        self.expect(self.button("Send")).to_be_visible()

    def reads(self, answer: str) -> None:
        """Waits until the last answer reads `answer`."""
        self.expect(self.answers.last.locator(".prose")).to_have_text(answer)

    def button(self, name: str):
        return self.page.get_by_role("button", name=name, exact=True)

    def color(self, element: str, what: str) -> tuple[float, ...]:
        script = "([e, w]) => getComputedStyle(document.querySelector(e))[w]"
        text = self.page.evaluate(script, [element, what])
        return tuple(float(x) for x in text[text.index("(") + 1 : -1].split(",")[:3])
