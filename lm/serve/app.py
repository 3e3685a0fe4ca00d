"""The web application: paths, limits, and how a call's tokens become an answer."""

import asyncio
import contextlib
import logging
import traceback
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from lm.errors import nearest
from lm.serve import http, metrics, protocol
from lm.serve.chat import Chat
from lm.serve.completions import Completion
from lm.serve.errors import ApiError, internal, too_slow, unavailable
from lm.serve.generation import follow
from lm.serve.router import Source, Split
from lm.serve.variants import Variant
from lm.serve.worker import Worker

PAGE = Path(__file__).parent / "page" / "index.html"
log = logging.getLogger("lm.serve")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What requests are held to.

    Args:
      max_body: bytes of a request.
      max_queue: sequences that wait for their first token.
      timeout: seconds of a request, from its arrival to its last token.
      keys: API keys; none: everybody may ask.
    """

    max_body: int = 4_000_000
    max_queue: int = 1_000
    timeout: float = 600.0
    keys: list[str] = field(default_factory=list)


class Service:
    """What the handlers share.

    draining   whether the server is about to stop
    active     requests under /v1 that are being answered; `idle` is set while there is none
    """

    def __init__(self, worker: Worker, limits: Limits, sources: list[Source], split: str):
        self.worker, self.limits, self.metrics = worker, limits, metrics.Metrics()
        weights = {source.name: source.weight for source in sources if source.weight is not None}
        self.split, self.split_name = Split(weights) if weights else None, split
        self.draining, self.active, self.idle = False, 0, asyncio.Event()
        self.idle.set()

    def check_ready(self) -> None:
        """Raises ApiError 503 while loading and while shutting down."""
        if self.draining:
            raise unavailable("The server is shutting down.")
        if not self.worker.ready:
            raise unavailable("The model is still loading; ask again when /ready answers 200.")

    def find(self, model: str | None, user: str | None) -> tuple[str, Variant]:
        """(the name that was asked for, the variant that answers it). Without a name: the split, or
        the first model."""
        variants = self.worker.variants
        if model is None:
            model = self.split_name if self.split else next(iter(variants))
        if self.split and model == self.split_name:
            return model, variants[self.split.choose(user)]
        if model not in variants:
            known = [*variants, *([self.split_name] if self.split else [])]
            message = f"model={model[:100]!r} is not known.{nearest(model[:100], known)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return model, variants[model]

    def submit(self, made: Completion | Chat) -> None:
        """Begins a call. Raises ApiError 429 if too many sequences wait."""
        new, most = len(made.call.continuations), self.limits.max_queue
        if new > most:
            message = f"The request has {new} sequences, and the queue holds {most}; ask for fewer."
            raise ApiError(400, message, param="n", code="invalid_value")
        if self.worker.waiting + new > most:
            raise ApiError(
                429,
                f"The queue is full: {self.worker.waiting} sequences wait. Ask again later.",
                kind="rate_limit_error",
                code="queue_full",
                headers={"retry-after": "1"},
            )
        self.worker.submit(made.call)

    async def follow(self, name: str, made: Completion | Chat) -> AsyncGenerator[Any, None]:
        """`generation.follow`, counted."""
        unfinished = "cancelled"
        try:
            async with contextlib.aclosing(follow(self.worker, made.call, made.choices)) as pieces:
                async for piece in pieces:
                    yield piece
        except ApiError:
            unfinished = "error"
            raise
        finally:
            reasons = [choice.finish or unfinished for choice in made.choices]
            self.metrics.call(name, made.call, reasons, made.tokens, made.cached)


async def answer(service: Service, request: Request, kind: Any, made_by: Any) -> Response:
    """Answers a POST: `kind` is the request's model, `made_by` makes the call of it."""
    deadline = asyncio.get_running_loop().time() + service.limits.timeout
    service.check_ready()
    try:
        async with asyncio.timeout_at(deadline):
            body = await http.read_body(request, service.limits.max_body)
            options = protocol.parse(kind, body)
            name, variant = service.find(options.model, options.user or options.safety_identifier)
            # Templates, tokenizers and grammars may take their time.
            made = await asyncio.to_thread(made_by, variant, options)
            service.check_ready()
            service.submit(made)
            pieces = service.follow(name, made)
            if not options.stream:
                await http.while_connected(request.receive, _all(pieces))
                return JSONResponse(made.answer())
            events = _events(made, pieces, options.stream_options.include_usage)
            # An error before the first token has a status of its own.
            first = await http.while_connected(request.receive, anext(events))
    except TimeoutError:
        raise too_slow(service.limits.timeout) from None
    return http.Events(_guarded(first, events, deadline, service.limits.timeout))


async def _all(pieces: AsyncGenerator[Any, None]) -> None:
    async with contextlib.aclosing(pieces):
        async for _ in pieces:
            pass


async def _events(
    made: Completion | Chat, pieces: AsyncGenerator[Any, None], include_usage: bool
) -> AsyncGenerator[str, None]:
    more = {"usage": None} if include_usage else {}
    async with contextlib.aclosing(pieces):
        async for chunk in made.chunks(pieces):
            yield http.event({**chunk, **more})
    if include_usage:
        yield http.event({**made.head(), "usage": made.usage()})


async def _guarded(
    first: str, events: AsyncGenerator[str, None], deadline: float, seconds: float
) -> AsyncIterator[str]:
    """The events to the end of the stream. An error becomes the last of them."""
    async with contextlib.aclosing(events):
        try:
            yield first
            while True:
                async with asyncio.timeout_at(deadline):
                    following = await anext(events, None)
                if following is None:
                    break
                yield following
        except ApiError as error:
            yield http.event(error.body())
        except TimeoutError:
            yield http.event(too_slow(seconds).body())
        except Exception:
            log.error("%s", traceback.format_exc())
            yield http.event(internal().body())
    yield "data: [DONE]\n\n"


def make(service: Service) -> "Guard":
    """The application."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(service, request, protocol.CompletionRequest, Completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(service, request, protocol.ChatRequest, Chat)

    @app.get("/v1/models")
    async def models() -> Response:
        service.check_ready()
        return JSONResponse({"object": "list", "data": _models(service)})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_ready()
        service.find(name, None)
        return JSONResponse(next(each for each in _models(service) if each["id"] == name))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        service.check_ready()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics_page() -> Response:
        text = service.metrics.text(service.worker.stats)
        return Response(text, media_type=metrics.CONTENT_TYPE)

    @app.get("/")
    async def page() -> Response:
        if not PAGE.exists():
            raise ApiError(404, "The chat page is not installed.", code="not_found")
        # No stale page after an update, and no frame of it in another site.
        headers = {"cache-control": "no-cache", "x-frame-options": "DENY"}
        return FileResponse(PAGE, media_type="text/html; charset=utf-8", headers=headers)

    _add_errors(app)
    return Guard(app, service)


def _models(service: Service) -> list[dict[str, Any]]:
    """The names that can be asked for."""
    variants = service.worker.variants.values()
    found = [
        {
            "id": variant.name,
            "object": "model",
            "created": variant.created,
            "owned_by": "lm",
            "parent": variant.parent,
            "max_model_len": variant.context,
        }
        for variant in variants
    ]
    if service.split:
        own = [variant for variant in variants if variant.name in service.split.weights]
        split = {
            "id": service.split_name,
            "parent": None,
            "max_model_len": min(variant.context for variant in own),
            "weights": service.split.weights,
        }
        found.insert(0, {**found[0], **split})
    return found


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def of_api(request: Request, error: ApiError) -> Response:
        return http.error_response(error)

    @app.exception_handler(http.ClientLeft)
    async def of_client(request: Request, error: http.ClientLeft) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        words = {
            404: f"{request.url.path} is no path of this server.",
            405: f"{request.method} is not allowed at {request.url.path}.",
        }
        message = words.get(error.status_code, f"{error.detail}.")
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return http.error_response(
            ApiError(error.status_code, message, code=code, headers=error.headers)
        )

    @app.exception_handler(Exception)
    async def of_all(request: Request, error: Exception) -> Response:
        return http.error_response(internal())


class Guard:
    """Around the application: API keys, and counts of requests."""

    def __init__(self, app: FastAPI, service: Service):
        self._app, self.service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service, path = self.service, scope["path"]
        is_api = path == "/v1" or path.startswith("/v1/")

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                service.metrics.response(_label(path), message["status"])
            await send(message)

        service.active += 1
        service.idle.clear()
        try:
            if is_api:
                header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
                http.check_key(header, service.limits.keys)
            await self._app(scope, receive, counted)
        except ApiError as error:
            await http.error_response(error)(scope, receive, counted)
        finally:
            service.active -= 1
            if not service.active:
                service.idle.set()


def _label(path: str) -> str:
    """A path as a label: clients must not make labels up."""
    known = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/ready")
    return path if path in (*known, "/metrics", "/") else "other"
