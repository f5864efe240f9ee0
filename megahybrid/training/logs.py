"""A log a process in the run directory."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from megahybrid.parallel import groups
from megahybrid.retry import retry

log = logging.getLogger("megahybrid")


@contextlib.contextmanager
def rank_log(folder: Path) -> Iterator[None]:
    """Append what the package logs to `folder/rank_00000.log` while it is entered, and who this process is.

    Warnings of the main process also go to the terminal.
    """
    rank, world = groups.world()
    to_file = retry(lambda: _open(folder / f"rank_{rank:05d}.log"), f"Writing to {folder}")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    to_terminal = logging.StreamHandler()
    to_terminal.setLevel(logging.WARNING if groups.is_main() else logging.CRITICAL)
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(to_file)
    log.addHandler(to_terminal)
    try:
        places = {
            "tensor": groups.tensor_parallel(),
            "context": groups.context_parallel(),
            "pipeline": groups.pipeline_parallel(),
            "data": groups.data_parallel(),
        }
        where = ", ".join(f"{name} {rank} of {size}" for name, (rank, size) in places.items())
        host = socket.gethostname()
        log.info("rank %d of %d (%s) on %s, process %d, %s", rank, world, where, host, os.getpid(), groups.device())
        yield
    finally:
        log.setLevel(level)
        for handler in (to_file, to_terminal):
            log.removeHandler(handler)
            with contextlib.suppress(OSError):
                handler.close()


def _open(file: Path) -> logging.FileHandler:
    file.parent.mkdir(parents=True, exist_ok=True)
    return logging.FileHandler(file, encoding="utf-8")
