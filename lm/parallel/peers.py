"""Ends all processes of a run within seconds when one of them ends, with the message of that one.

When one process fails, the others would wait for it in their next collective. Therefore each keeps
a connection to process 0, which forwards the last message of a process to all others. A connection
that closes without a message means that the process was killed: its operating system closed the
connection. The loss of a host together with its network is detected by JAX's heartbeats after
100 seconds.
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

_EXIT_TIMEOUT = 10.0  # seconds for the other processes to end
_CONNECT_TIMEOUT = 60.0  # seconds for the other processes to connect
_MAX_BYTES = 4096  # of a message
_GOODBYE = "."  # sent by a process that ends normally

_watcher: "_Watcher | None" = None


def watch(client: Any, host: str, index: int, count: int) -> None:
    """Starts watching the other processes, in a thread.

    Args:
      client: of JAX's coordination service; processes get the port of process 0 through it.
      host: address of process 0. A process that cannot connect to it runs without watching.
      index: of this process, of `count`.
    """
    global _watcher
    if count == 1 or _watcher is not None:
        return
    if index == 0:
        server, token = socket.create_server(("", 0)), secrets.token_hex(16)
        client.key_value_set("lm/peers", f"{server.getsockname()[1]} {token}")
        _watcher = _MainWatcher(_accept(server, token, count - 1))
    else:
        timeout_ms = int(1000 * _CONNECT_TIMEOUT)
        port, token = client.blocking_key_value_get("lm/peers", timeout_ms).split()
        try:
            connection = socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT)
        except OSError:
            return
        connection.settimeout(None)
        connection.sendall(f"{token} {index}\n".encode())
        _watcher = _PeerWatcher(connection)
    threading.Thread(target=_watcher.run, daemon=True, name="peers").start()
    atexit.register(_watcher.leave)
    sys.excepthook = _on_unexpected_exception


def _accept(server: socket.socket, token: str, count: int) -> dict[socket.socket, int]:
    """{connection: process index} of the processes that connect in time."""
    peers: dict[socket.socket, int] = {}
    server.settimeout(_CONNECT_TIMEOUT)
    with server, contextlib.suppress(OSError):
        while len(peers) < count:
            connection, _ = server.accept()
            connection.settimeout(_CONNECT_TIMEOUT)
            received_token, _, index = _read_line(connection).partition(" ")
            if received_token == token:
                peers[connection] = int(index)
    return peers


def end(message: str, code: int) -> None:
    """Prints the message on all processes and ends them with `code`. Returns when the run has a
    single process."""
    if _watcher is not None:
        _watcher.end(message, code)


def _on_unexpected_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Prints the traceback, then ends all processes.

    Waits for a second first: the exception may be the effect of another process that was killed
    during a collective. In that case the watcher ends this process with that message instead.
    """
    if isinstance(error, Exception):
        time.sleep(1)
    traceback.print_exception(kind, error, trace)
    end(f"ended by {kind.__name__}; the lines above say where.", 1)


class _Watcher:
    """Base of both sides. The thread that acquires `_ending` prints its message and exits."""

    def __init__(self) -> None:
        self._ending = threading.Lock()

    def _print_and_exit(self, message: str, code: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(message, file=sys.stderr, flush=True)
        self._exit(code)

    def _exit(self, code: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)  # not sys.exit: JAX would wait for the other processes at shutdown


class _MainWatcher(_Watcher):
    """Process 0: receives the messages of all others."""

    def __init__(self, peers: dict[socket.socket, int]):
        super().__init__()
        self._peers = peers

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    self._receive(key.fileobj)
                    selector.unregister(key.fileobj)

    def _receive(self, peer: socket.socket) -> None:
        line, index = _read_line(peer), self._peers[peer]
        if line == _GOODBYE:
            return
        code, _, message = line.partition(" ")
        message = f"{message} (from process {index})" if code else _killed(index)
        if self._ending.acquire(blocking=False):
            self._broadcast(f"{code or 1} {message}")
            self._print_and_exit(message, int(code or 1))

    def end(self, message: str, code: int) -> None:
        self._ending.acquire()
        print(message, file=sys.stderr, flush=True)
        self._broadcast(f"{code} {message} (from process 0)")
        self._exit(code)

    def _broadcast(self, line: str) -> None:
        """Sends to all peers and waits until they have ended: JAX's coordination service ends with
        this process."""
        deadline = time.monotonic() + _EXIT_TIMEOUT
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(f"{_one_line(line)}\n".encode())
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.settimeout(max(deadline - time.monotonic(), 0.01))
                while peer.recv(_MAX_BYTES):
                    pass

    def leave(self) -> None:
        if self._ending.acquire(blocking=False):
            for peer in self._peers:
                with contextlib.suppress(OSError):
                    peer.sendall(f"{_GOODBYE}\n".encode())


class _PeerWatcher(_Watcher):
    """Any process but 0: receives the messages that process 0 forwards."""

    def __init__(self, connection: socket.socket):
        super().__init__()
        self._connection, self._code = connection, 0

    def run(self) -> None:
        line = _read_line(self._connection)
        if line == _GOODBYE:
            return
        code, _, message = line.partition(" ")
        if self._ending.acquire(blocking=False):
            self._print_and_exit(message or _killed(0), int(code or 1))
        self._exit(self._code or 1)  # this process sent the message

    def end(self, message: str, code: int) -> None:
        self._ending.acquire()
        self._code = code
        print(message, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self._connection.sendall(f"{code} {_one_line(message)}\n".encode())
        time.sleep(_EXIT_TIMEOUT)  # process 0 answers, and `run` ends this process
        self._exit(code)

    def leave(self) -> None:
        if self._ending.acquire(blocking=False):
            with contextlib.suppress(OSError):
                self._connection.sendall(f"{_GOODBYE}\n".encode())


def _read_line(connection: socket.socket) -> str:
    """One line without its newline; "" when the other side has closed."""
    line = b""
    with contextlib.suppress(OSError):
        while not line.endswith(b"\n") and (data := connection.recv(_MAX_BYTES)):
            line += data
    return line.decode(errors="replace").rstrip("\n")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _killed(index: int) -> str:
    return (
        f"Process {index} was killed or lost, so this process ends too. "
        "Run the same command again to resume from the last checkpoint."
    )
