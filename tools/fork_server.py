"""Starts processes that have imported everything; workers.py starts it, and `python` there says how to ask it.

It listens at FOLDER/socket. A connection is a process: it brings arguments, environment, folder and the standard
streams (forked_python.py), hears of the process's number and of its end, and when it is closed the process is
killed before anything else is started. Standard input is a connection that holds the server; without any it ends.

Forked processes share what real starts draw anew or read for themselves: the seed of the hashes of strings, and what
modules take from the environment when they are imported. The tests that start `torchrun` stand for that.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from wandb.sdk.data_types._private import MEDIA_TMP

PRELOADED = (
    "deepspeed",
    "megatron.core.parallel_state",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.launcher.api",
    "megahybrid.cli",
    "megahybrid.training.loop",
)


class Start(NamedTuple):
    """What a process is started with."""

    arguments: list[str]
    """Python's: -m MODULE …, -c TEXT … or FILE …"""
    environment: dict[str, str]
    folder: str
    streams: list[int]


class Server:
    """Has one thread and must have no other: threads do not survive a fork."""

    def __init__(self, listener: socket.socket, holder: socket.socket):
        self._listener, self._selector = listener, selectors.DefaultSelector()
        self._processes: dict[socket.socket, int | None] = {}
        """Connection → process; None for those that only hold the server."""
        self._ended, self._wake = socket.socketpair()
        for each in (self._ended, self._wake):
            each.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for each in (self._listener, self._ended):
            self._selector.register(each, selectors.EVENT_READ)
        self._add(holder, None)

    def serve(self) -> Start | None:
        """Returns in every process that is started, with what it is to do; None in the server, at its end."""
        while None in self._processes.values():
            ready = [key.fileobj for key, _ in self._selector.select()]
            if self._ended in ready:
                self._reap()
            for connection in ready:
                if connection in self._processes:
                    self._kill(connection)
            if self._listener in ready and (start := self._accept()):
                return start
        for connection in list(self._processes):
            self._kill(connection)
        return None

    def _accept(self) -> Start | None:
        connection, _ = self._listener.accept()
        message, streams = receive(connection)
        if message is None:
            self._add(connection, None)
            tell(connection, 0)
            return None
        process = os.fork()
        if process == 0:
            connection.close()
            self._leave()
            return Start(**message, streams=streams)
        for stream in streams:
            os.close(stream)
        self._add(connection, process)
        tell(connection, process)
        return None

    def _leave(self) -> None:
        """In a new process: nothing of the server stays."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for each in (self._listener, self._ended, self._wake, *self._processes):
            each.close()

    def _add(self, connection: socket.socket, process: int | None) -> None:
        self._processes[connection] = process
        self._selector.register(connection, selectors.EVENT_READ)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._ended.recv(4096)
        for connection, process in list(self._processes.items()):
            if process is not None and (found := os.waitpid(process, os.WNOHANG))[0]:
                tell(connection, os.waitstatus_to_exitcode(found[1]))
                self._remove(connection)

    def _kill(self, connection: socket.socket) -> None:
        """The other side has closed the connection."""
        process = self._remove(connection)
        if process is not None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)

    def _remove(self, connection: socket.socket) -> int | None:
        self._selector.unregister(connection)
        connection.close()
        return self._processes.pop(connection)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """A message in JSON behind its length, and the streams that come with it."""
    content, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    (size,) = struct.unpack_from("i", content)
    while len(content) < 4 + size:
        content += connection.recv(1 << 16)
    return json.loads(content[4:]), streams


def tell(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(struct.pack("i", number))


def run(start: Start, installed: list[str]) -> None:
    """What Python does between its start and its end; `installed` is sys.path without the server's own folders."""
    for number, stream in enumerate(start.streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(start.environment)
    os.chdir(start.folder)
    kind, *rest = [each for each in start.arguments if each != "-u"]
    own = [each for each in start.environment.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.path[:] = [start.folder if kind in ("-m", "-c") else str(Path(kind).parent), *own, *installed]
    if kind == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv[:] = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def leave(work: Callable[[], None]) -> None:
    """Do it and end this process as Python does, but without half a second for taking down what is imported."""
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(code)


def main(folder: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/socket")
    listener.listen(100)
    own = {os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    installed = [each for each in sys.path if each not in own]
    for module in PRELOADED:
        importlib.import_module(module)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads after the imports: what is forked would lack all but one"
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # what the imports have said is nobody else's output
    gc.collect()
    gc.freeze()  # a collection in a process would copy what all share
    start = Server(listener, socket.socket(fileno=os.dup(0))).serve()
    if start is not None:
        numpy.random.seed()  # `random` does so by itself
        MEDIA_TMP.__init__("wandb-media")  # W&B's temporary folder: the first to end would remove everybody's
        leave(lambda: run(start, installed))


if __name__ == "__main__":
    main(sys.argv[1])
