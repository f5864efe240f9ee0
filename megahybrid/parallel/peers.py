"""Noticing at once that another process of the run has died, and ending this one.

A process that waits in a NCCL collective for one that is gone would wait until the group's timeout. Here every process
holds a TCP connection to rank 0, which the operating system closes when a process ends in whatever way: rank 0 sees
that, and tells all others who it was. There are no heartbeats: a process that is merely busy is never taken for dead.
A node that vanishes without a word is found by TCP's keepalive, within half a minute.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from megahybrid.errors import MachineFault, UserError
from megahybrid.parallel import groups
from megahybrid.retry import may_succeed

log = logging.getLogger(__name__)

_SECONDS_TO_CONNECT = 60.0
_SECONDS_TO_GREET = 5.0
_SECONDS_FOR_NEWS = 3.0
_LONGEST_GREETING = 1000  # bytes


class PeerWatch:
    """Watches the other processes while it is entered; entering it is collective. A single process has none.

    When one dies or fails, the main thread has `grace` seconds to fail by itself, as gloo's collectives make it; else
    `last_words(cause)` is called and the process exits with code 1.
    """

    def __init__(self, last_words: Callable[[UserError], None] = lambda cause: None, grace: float = 5.0):
        self._last_words, self._grace = last_words, grace
        self._cause: UserError | None = None
        self._news, self._left = threading.Event(), threading.Event()
        self._members: dict[socket.socket, str] = {}  # the other end of every connection, by name

    def __enter__(self) -> PeerWatch:
        rank, world = groups.world()
        if world > 1:
            listening = socket.create_server(("", 0)) if rank == 0 else None
            port = groups.broadcast(listening.getsockname()[1] if listening else None)
            name = f"Rank {rank} on {socket.gethostname()}"
            if listening:
                self._accept(listening, name, world - 1)
            else:
                self._connect((os.environ["MASTER_ADDR"], port), name)
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._left.set()
        for connection in list(self._members):
            left = None if error is None else _sentence(error)
            self._send(connection, {"left": left, "machine": error is not None and may_succeed(error)})
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    def explain(self, error: BaseException) -> BaseException:
        """The death of another process, if that is what is behind an error of this one; else the error itself."""
        if isinstance(error, Exception) and not isinstance(error, UserError) and self._members:
            self._news.wait(_SECONDS_FOR_NEWS)
        return error if self._cause is None else self._cause

    def _accept(self, listening: socket.socket, name: str, count: int) -> None:
        deadline = time.monotonic() + _SECONDS_TO_CONNECT
        with listening:
            while len(self._members) < count:
                try:
                    listening.settimeout(max(0.0, deadline - time.monotonic()))
                    connection, _ = listening.accept()
                except OSError as error:
                    log.warning("%d processes could not be watched (%s).", count - len(self._members), error)
                    return
                try:  # a port is open to scanners, too
                    connection.settimeout(min(_SECONDS_TO_GREET, max(0.1, deadline - time.monotonic())))
                    self._members[connection] = _receive_name(connection)
                except (OSError, ValueError, KeyError, TypeError):
                    connection.close()
                    continue
                self._keep_alive(connection)
                self._send(connection, {"name": name})

    def _connect(self, address: tuple[str, int], name: str) -> None:
        try:
            connection = socket.create_connection(address, timeout=_SECONDS_TO_CONNECT)
            self._send(connection, {"name": name})
            self._members[connection] = _receive_name(connection)
            self._keep_alive(connection)
        except OSError as error:
            log.warning("The other processes cannot be watched (%s).", error)

    @staticmethod
    def _keep_alive(connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    @staticmethod
    def _send(connection: socket.socket, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        """The thread: until all others have left."""
        with selectors.DefaultSelector() as selector:
            for connection in self._members:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    if self._cause is None and (cause := self._news_from(key.fileobj)):
                        self._alarm(cause)
                    elif self._members[key.fileobj].endswith(" left"):
                        selector.unregister(key.fileobj)
                if self._cause is not None:
                    return

    def _news_from(self, connection: socket.socket) -> UserError | None:
        """The death or failure of a process, if that is what the connection tells."""
        name = self._members[connection]
        for message in _receive(connection) or [None]:
            if message is None:
                return MachineFault(
                    f"{name} died; its log says more, and the same command goes on from the last checkpoint."
                )
            if "cause" in message:
                return _kind(message)(message["cause"])
            self._members[connection] = f"{name} left"
            if message["left"] is not None:
                return _kind(message)(f"{name} failed: {message['left']}")
        return None

    def _alarm(self, cause: UserError) -> None:
        """Pass the news on, and end this process unless its main thread does so in time."""
        self._cause = cause
        self._news.set()
        if groups.world()[0] == 0:
            for connection in self._members:
                self._send(connection, {"cause": str(cause), "machine": isinstance(cause, MachineFault)})
        if self._left.wait(self._grace):
            return
        log.info("%s", cause)
        with contextlib.suppress(Exception):
            self._last_words(cause)
        print(f"megahybrid (rank {groups.world()[0]}): {cause}", file=sys.stderr, flush=True)
        os._exit(1)


def _receive_name(connection: socket.socket) -> str:
    """The other end's greeting, and nothing of what may follow it at once."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _LONGEST_GREETING:
        if not (byte := connection.recv(1)):
            raise ConnectionError("it left at once")
        line += byte
    return json.loads(line)["name"]


def _receive(connection: socket.socket) -> list[dict[str, Any]]:
    """The next messages; none at the connection's end."""
    data = b""
    try:
        while not data.endswith(b"\n"):
            if not (piece := connection.recv(65536)):
                return []
            data += piece
    except OSError:  # reset, or no answer to TCP's keepalive
        return []
    return [json.loads(line) for line in data.splitlines()]


def _kind(message: dict[str, Any]) -> type[UserError]:
    return MachineFault if message["machine"] else UserError


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
