"""Runs the application: socket, signals, loading, graceful shutdown."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn

from lm.errors import UserError
from lm.serve import app, variants
from lm.serve.app import Limits, Service
from lm.serve.errors import ApiError, unavailable
from lm.serve.router import Source, check_names
from lm.serve.variants import Reading, Variant
from lm.serve.worker import Worker

KEEP_ALIVE = 60  # seconds that an unused connection stays open
ERROR_SECONDS = 5.0  # seconds to send errors to clients whose requests did not end in time


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to serve, and where.

    Args:
      sources, adapters: folders and their names.
      split: name of the model that splits requests by weight.
      host, port: to listen at; port 0: any that is free.
      grace: seconds that running requests have to end, at a shutdown.
    """

    sources: list[Source]
    adapters: list[Source]
    split: str = "split"
    host: str = "127.0.0.1"
    port: int = 8000
    grace: float = 30.0
    reading: Reading = Reading()
    limits: Limits = Limits()


class Server(uvicorn.Server):
    """The server. `run` returns when it has stopped; `stop` may be called in any thread.

    url, port  where it listens
    loop       in which the handlers run
    is_ready   set when requests are answered, and when the server has stopped
    signal     the one that stopped it
    """

    def __init__(self, settings: Settings, say: Callable[[str], None] = lambda line: None):
        check_names(settings.sources, settings.adapters, settings.split)
        self.settings, self._say = settings, say
        self._socket = _listen(settings.host, settings.port)
        host, self.port = self._socket.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self.worker = Worker(self._load, notify=self._notified)
        self.service = Service(self.worker, settings.limits, settings.sources, settings.split)
        self.is_ready, self.signal = threading.Event(), None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._drains: asyncio.Task[None] | None = None
        super().__init__(
            uvicorn.Config(
                app.make(self.service),
                lifespan="off",
                ws="none",
                log_config=None,  # it would close the handlers of others
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(ERROR_SECONDS),
            )
        )

    def run(self, sockets: Any = None) -> None:
        """Serves until it is stopped. Raises the error of loading, or of an engine."""
        self._say(f"listening at {self.url}; loading")
        try:
            super().run(sockets=[self._socket])
        finally:
            self.worker.close()
            if self.worker.ident is not None:
                self.worker.join(timeout=ERROR_SECONDS)
            self.is_ready.set()
        if self.worker.failed is not None:
            raise self.worker.failed

    def stop(self) -> None:
        """No new requests; running ones have `grace` seconds, and none after a second call."""
        if self.loop is None:
            self.should_exit = True
        else:
            with contextlib.suppress(RuntimeError):  # it has stopped
                self.loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._drains is None:
            self._drains = asyncio.ensure_future(self._drain())
        else:
            self.worker.fail_all(unavailable("The server is shutting down."))

    async def _drain(self) -> None:
        service = self.service
        service.draining = True
        if self.worker.failed is None:
            self._say("shutting down: finishing the running requests")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0 if self.worker.failed else self.settings.grace):
                await service.idle.wait()
        if service.active:
            self.worker.fail_all(unavailable("The server is shutting down."))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ERROR_SECONDS):
                    await service.idle.wait()
        self.should_exit = True

    async def startup(self, sockets: Any = None) -> None:
        """Listens, and begins to load."""
        await super().startup(sockets=sockets)
        self.loop = asyncio.get_running_loop()
        self.worker.begin(self.loop)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stops at SIGINT and SIGTERM."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {each: signal.signal(each, self.handle_exit) for each in signals}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of a signal."""
        self.signal = self.signal or sig
        self.stop()

    # In the worker's thread

    def _load(self) -> list[Variant]:
        settings = self.settings
        found = variants.read(settings.sources, settings.adapters, settings.reading)
        for variant in found:
            variant.build()
            self._say(variant.describe())
            try:
                _ = variant.template
            except ApiError as error:
                self._say(f"{variant.name}: /v1/chat/completions is refused: {error}")
        return found

    def _notified(self) -> None:
        """The worker is ready, or has failed."""
        if self.worker.failed is not None:
            self._stop()
        elif self.worker.ready:
            self._say(f"ready: {self.url}/v1")
            self.is_ready.set()


def serve(settings: Settings, say: Callable[[str], None]) -> None:
    """Serves until a signal, and then exits with 128 and its number."""
    server = Server(settings, say)
    server.run()
    say("stopped")
    code = 128 + server.signal if server.signal else 0
    if server.worker.is_alive():  # a compilation cannot be interrupted, and would keep the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _listen(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises UserError if it is not to be had."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"--host={host} is no address of this machine ({error}).") from None
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        why = (error.strerror or str(error)).lower()
        raise UserError(
            f"--port={port} at --host={host} cannot be used ({why}); stop the other server, or "
            "choose another port."
        ) from None
    listening.setblocking(False)
    return listening
