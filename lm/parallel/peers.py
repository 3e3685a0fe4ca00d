"""When one process of several ends, all end: with its last word, and within seconds.

A process that fails alone would leave the others waiting for it. So each holds a connection to
process 0, which passes a last word on to all. A connection that breaks without one tells of a
process that was killed, for its system has closed it. A host that is lost together with its network
is left to JAX's heartbeats, which miss it after 100 seconds.
"""

import atexit
import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from typing import Any

_WAIT = 10.0  # seconds for the others to end
_JOIN = 60.0  # seconds for the others to connect
_LONGEST = 4096  # bytes of a last word
_GOODBYE = "."

_watch: "_Watch | None" = None


def watch(client: Any, host: str, index: int, count: int) -> None:
    """Begins, in a thread. `client` is that of JAX's coordination service, on `host`, through which
    the processes learn where process 0 listens. Where they cannot connect, they do without."""
    global _watch
    if count == 1 or _watch is not None:
        return
    if index == 0:
        server, token = socket.create_server(("", 0)), secrets.token_hex(16)
        client.key_value_set("lm/peers", f"{server.getsockname()[1]} {token}")
        _watch = _Main(_accepted(server, token, count - 1))
    else:
        port, token = client.blocking_key_value_get("lm/peers", int(1000 * _JOIN)).split()
        try:
            connection = socket.create_connection((host, int(port)), timeout=_JOIN)
        except OSError:
            return
        connection.settimeout(None)
        connection.sendall(f"{token} {index}\n".encode())
        _watch = _Other(connection)
    threading.Thread(target=_watch.run, daemon=True, name="peers").start()
    atexit.register(_watch.leave)
    sys.excepthook = _unexpected


def _accepted(server: socket.socket, token: str, count: int) -> dict[socket.socket, int]:
    """The connections of all others, as far as they come in time."""
    peers: dict[socket.socket, int] = {}
    server.settimeout(_JOIN)
    with server, contextlib.suppress(OSError):
        while len(peers) < count:
            connection, _ = server.accept()
            connection.settimeout(_JOIN)
            given, _, index = _read(connection).partition(" ")
            if given == token:
                peers[connection] = int(index)
    return peers


def end(sentence: str, code: int) -> None:
    """Says the sentence, here and on all processes, and ends them. Returns at once where there is
    one process only."""
    if _watch is not None:
        _watch.end(sentence, code)


def _unexpected(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What no one expected keeps its traceback. It may be that another process was killed and this
    one heard of it in the middle of a sum: then that is said instead."""
    if isinstance(error, Exception):
        time.sleep(1)
    traceback.print_exception(kind, error, trace)
    end(f"ended by {kind.__name__}; the lines above say where.", 1)


class _Watch:
    """Either side. `_ending` is taken once: whoever has it speaks, and the process ends."""

    def __init__(self) -> None:
        self._ending = threading.Lock()

    def _last(self, sentence: str, code: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(sentence, file=sys.stderr, flush=True)
        self._exit(code)

    def _exit(self, code: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)  # not sys.exit: JAX would wait for the others to leave with it


class _Main(_Watch):
    """Process 0."""

    def __init__(self, peers: dict[socket.socket, int]):
        super().__init__()
        self._peers = peers

    def run(self) -> None:
        with selectors.DefaultSelector() as ready:
            for peer in self._peers:
                ready.register(peer, selectors.EVENT_READ)
            while ready.get_map():
                for key, _ in ready.select():
                    self._hear(key.fileobj)
                    ready.unregister(key.fileobj)

    def _hear(self, peer: socket.socket) -> None:
        said, index = _read(peer), self._peers[peer]
        if said == _GOODBYE:
            return
        code, _, sentence = said.partition(" ")
        sentence = f"{sentence} (said by process {index})" if code else _died(index)
        if self._ending.acquire(blocking=False):
            self._tell(f"{code or 1} {sentence}")
            self._last(sentence, int(code or 1))

    def end(self, sentence: str, code: int) -> None:
        self._ending.acquire()
        print(sentence, file=sys.stderr, flush=True)
        self._tell(f"{code} {sentence} (said by process 0)")
        self._exit(code)

    def _tell(self, line: str) -> None:
        """All peers; waits until they have ended, for JAX's own service ends with this process."""
        late = time.monotonic() + _WAIT
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(f"{_one_line(line)}\n".encode())
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.settimeout(max(late - time.monotonic(), 0.01))
                while peer.recv(_LONGEST):
                    pass

    def leave(self) -> None:
        if self._ending.acquire(blocking=False):
            for peer in self._peers:
                with contextlib.suppress(OSError):
                    peer.sendall(f"{_GOODBYE}\n".encode())


class _Other(_Watch):
    """Any other process."""

    def __init__(self, connection: socket.socket):
        super().__init__()
        self._connection, self._code = connection, 0

    def run(self) -> None:
        said = _read(self._connection)
        if said == _GOODBYE:
            return
        code, _, sentence = said.partition(" ")
        if self._ending.acquire(blocking=False):
            self._last(sentence or _died(0), int(code or 1))
        self._exit(self._code or 1)  # it was this process that had spoken

    def end(self, sentence: str, code: int) -> None:
        self._ending.acquire()
        self._code = code
        print(sentence, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self._connection.sendall(f"{code} {_one_line(sentence)}\n".encode())
        time.sleep(_WAIT)  # process 0 answers, and `run` ends this process
        self._exit(code)

    def leave(self) -> None:
        if self._ending.acquire(blocking=False):
            with contextlib.suppress(OSError):
                self._connection.sendall(f"{_GOODBYE}\n".encode())


def _read(connection: socket.socket) -> str:
    """One line, without its end; "" when the other side is gone."""
    line = b""
    with contextlib.suppress(OSError):
        while not line.endswith(b"\n") and (more := connection.recv(_LONGEST)):
            line += more
    return line.decode(errors="replace").rstrip("\n")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _died(index: int) -> str:
    return (
        f"Process {index} was killed or lost, so this one ends too; "
        "the same command goes on from the last checkpoint."
    )
