"""A pool of processes that join a new process group for every call: importing everything costs each once only."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import socket
import time
import traceback
from multiprocessing import connection
from typing import Any

import torch.multiprocessing as multiprocessing


class Workers:
    """`count` processes; `run` calls a function on the first `world` of them as ranks of one group."""

    def __init__(self, count: int):
        self._count, self._context = count, multiprocessing.get_context("spawn")
        self._processes: list[tuple[Any, Any]] = []

    def run(self, world: int, function: str, *arguments: Any, timeout: float = 180) -> list[Any]:
        """`function` is "module:name"; returns every rank's result. Raises AssertionError when one fails."""
        if not self._processes:
            self._start()
        port = free_port()
        for rank, (_, pipe) in enumerate(self._processes[:world]):
            pipe.send((function, arguments, rank, world, port))
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._processes[:world])}
        results, faults, deadline = {}, [], time.monotonic() + timeout
        while waiting and (ready := connection.wait(list(waiting), max(0.1, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    done, value = pipe.recv()
                except EOFError:
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
        for process, _ in self._processes:
            process.kill()
            process.join()
        self._processes = []

    def _start(self) -> None:
        for _ in range(self._count):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))


def free_port() -> int:
    """Outside the range from which the system gives ports to connections: nobody takes it before we do."""
    while True:
        port = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def _serve(pipe: Any) -> None:
    while True:
        function, arguments, rank, world, port = pipe.recv()
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        _reset_deepspeed()
        try:
            module, name = function.split(":")
            pipe.send((True, getattr(importlib.import_module(module), name)(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            with contextlib.suppress(Exception):
                from megahybrid.parallel import groups

                groups.shut_down()


def _reset_deepspeed() -> None:
    """Start ZeRO-3's numbers of parameters and modules anew: ranks that took part in other calls would differ."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = 0
    for default in DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ or ():
        if isinstance(default, list):
            default[0] = 0
