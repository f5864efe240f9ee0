"""Processes of one's own that have imported everything already: `python()` for commands, Workers for functions.

Importing training takes 5 to 9 seconds of a core; a fork of a process that has done so takes 20 ms. One server a run
of pytest does the imports (fork_server.py), when the first test wants a process. Without MEGAHYBRID_FORKS, the folder
of that server, processes are started as usual: where there is a GPU, which forks of a process that may have asked for
it cannot use, and in the benchmarks.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import pickle
import random
import shlex
import socket
import struct
import subprocess
import sys
import time
import traceback
from multiprocessing import connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_holding: tuple[socket.socket, subprocess.Popen | None] | None = None
"""A connection, while which is open the server lives, and the server where this process has started it."""


def python() -> str:
    """A program that behaves as Python with this clone on its path: `-m MODULE …`, `-c TEXT …` or `FILE …`.

    Standard streams, environment, working directory, signals and exit codes are as with Python; what is killed is
    gone when the next process starts. Use sys.executable where the start itself is what is tested.
    """
    global _holding
    if "MEGAHYBRID_FORKS" not in os.environ:
        return sys.executable
    folder = Path(os.environ["MEGAHYBRID_FORKS"])
    if _holding is None:
        with open(folder / "server.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _holding = _join(folder / "socket") or _start_server(folder)
    return str(folder / "python")


def let_go() -> None:
    """At the end of the tests of this process: without any others, the server's processes end, and it does."""
    global _holding
    if _holding is not None:
        holding, server = _holding
        holding.close()
        _holding = None
        if server is not None:
            server.wait()


def environment(**more: str) -> dict[str, str]:
    """That of this process, with this clone on the path."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", **more}


def _join(address: Path) -> tuple[socket.socket, None] | None:
    """Hold the server that another process of this run has started, if it lives."""
    holding = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(OSError):
        holding.connect(str(address))
        holding.sendall(struct.pack("i", 4) + b"null")
        if holding.recv(4):
            return holding, None
    holding.close()
    return None


def _start_server(folder: Path) -> tuple[socket.socket, subprocess.Popen]:
    (folder / "socket").unlink(missing_ok=True)
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tools.fork_server", str(folder)]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            command, stdin=theirs, stdout=log, stderr=log, env=environment(), cwd=ROOT, start_new_session=True
        )
    theirs.close()
    while not (folder / "socket").exists():  # it listens before it imports
        assert server.poll() is None, (folder / "server.log").read_text()
        time.sleep(0.01)
    program = folder / "python"
    asks = shlex.join([sys.executable, "-I", "-S", str(ROOT / "tools" / "forked_python.py"), str(folder / "socket")])
    program.write_text(f'#!/bin/sh\nexec {asks} "$@"\n')
    program.chmod(0o755)
    return ours, server


class Workers:
    """Processes, as many as were ever asked for; `run` calls a function on `world` of them as ranks of one group."""

    def __init__(self) -> None:
        self._processes: list[tuple[subprocess.Popen, connection.Connection]] = []

    def run(self, world: int, function: str, *arguments: Any, timeout: float = 180) -> list[Any]:
        """`function` is "module:name"; returns every rank's result. Raises AssertionError when one fails."""
        self._start(world - len(self._processes))
        port = free_port()
        for rank, (_, pipe) in enumerate(self._processes[:world]):
            pipe.send_bytes(pickle.dumps((function, arguments, rank, world, port)))
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._processes[:world])}
        results, faults, deadline = {}, [], time.monotonic() + timeout
        while waiting and (ready := connection.wait(list(waiting), max(0.1, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    done, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    done, value = False, "the process died"
                if done:
                    results[rank] = value
                else:  # the others may wait for it for ever
                    faults.append(f"rank {rank} of {world}: {value}")
                    deadline = min(deadline, time.monotonic() + 5)
        faults = [f"rank {rank} of {world}: timed out" for rank in waiting.values()] + faults
        if faults:
            self.close()
            raise AssertionError("\n".join(faults))
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        for process, pipe in self._processes:
            process.kill()
            process.wait()
            pipe.close()
        self._processes = []

    def _start(self, count: int) -> None:
        for _ in range(count):
            ours, theirs = socket.socketpair()
            command = [python(), "-c", f"from {__name__} import serve; serve()"]
            paths = os.pathsep.join(path for path in sys.path if path)
            process = subprocess.Popen(command, stdin=theirs, env=environment(PYTHONPATH=paths))
            theirs.close()
            self._processes.append((process, connection.Connection(ours.detach())))


def free_port() -> int:
    """Outside the range from which the system gives ports to connections: nobody takes it before we do."""
    while True:
        port = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def serve() -> None:
    """The life of a worker, whose standard input is the connection to its pool."""
    pipe = connection.Connection(os.dup(0))
    with contextlib.suppress(EOFError):
        while True:
            _call(pipe, *pickle.loads(pipe.recv_bytes()))


def _call(pipe: connection.Connection, function: str, arguments: tuple, rank: int, world: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        module, name = function.split(":")
        answer = True, getattr(importlib.import_module(module), name)(*arguments)
        pipe.send_bytes(pickle.dumps(answer))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        with contextlib.suppress(Exception):
            from megahybrid.parallel import groups

            groups.shut_down()
