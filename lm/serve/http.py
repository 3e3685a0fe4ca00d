"""Parts of HTTP: bodies of limited size, streams of events, and clients that leave."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from lm.serve.errors import ApiError

T = TypeVar("T")
DISCARD_SECONDS = 10.0  # to read what is left of a body that is too long


class ClientLeft(Exception):
    """The client has closed the connection."""


async def read_body(request: Request, most: int) -> bytes:
    """The body of a POST of JSON. Raises ApiError 413 if it is longer than `most` bytes, and 415
    if it is something else.

    Browsers send JSON to other sites only if these allow it, so that no page can use a server on
    the same machine.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"content-type={kind!r} must be 'application/json'."
        raise ApiError(415, message, code="unsupported_media_type")
    parts, length, more = [], 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        length, more = length + len(parts[-1]), message.get("more_body", False)
        if length > most:
            if more:
                await _discard(request)
            raise ApiError(
                413,
                f"The body is longer than {most:,} bytes; send fewer or shorter prompts, or "
                "start the server with a larger --max-body.",
                code="body_too_large",
            )
    return b"".join(parts)


async def _discard(request: Request) -> None:
    """Reads the rest of a body: a client that is still sending would not see the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while (await request.receive()).get("more_body"):
                pass


async def while_connected(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """The result of `work`. Cancels it, and raises ClientLeft, when the client leaves."""

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class Events(Response):
    """Server-sent events. `events` is closed when all are sent, or when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with contextlib.suppress(ClientLeft):
            await while_connected(receive, self._send(send))

    async def _send(self, send: Any) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with contextlib.aclosing(self._events) as events:
            await send(head)
            async for event in events:
                body = event.encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def event(body: dict[str, Any]) -> str:
    """One event of JSON."""
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n"


def error_response(error: ApiError) -> JSONResponse:
    """An error as an answer."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


def check_key(header: str | None, keys: list[str]) -> None:
    """Raises ApiError 401 unless the header is 'Bearer KEY' with one of the keys; any header will
    do without keys."""
    scheme, _, given = (header or "").partition(" ")
    known = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if keys and not (scheme.lower() == "bearer" and any(known)):
        raise ApiError(
            401,
            "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
