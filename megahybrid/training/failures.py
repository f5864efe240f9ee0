"""The first failure of a run's processes, brought to the top: logs/failure.txt and status.json.

When one process fails, the others follow within seconds with errors of their own. The first to write decides: the file
is created, never overwritten, until the next start moves it away.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import traceback

import torch
import torch.distributed as dist

from megahybrid.errors import MachineFault, UserError
from megahybrid.training.ownership import NotOwner, another
from megahybrid.training.run_directory import RunDirectory


def record(run: RunDirectory, error: BaseException, step: int | None = None, details: str = "") -> None:
    """Write why this process ends, unless another one of the run has; nothing where the disk does not take it.

    `step` is the last finished one, where status.json may know an older one; `details` stand in the place of the
    error's traceback.
    """
    sentence = describe(error)
    if not details and not isinstance(error, UserError):
        details = "".join(traceback.format_exception(error))
    facts = {
        "when": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "where": f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}, process {os.getpid()}",
        "job": os.environ.get("SLURM_JOB_ID", "none"),
    }
    text = "\n".join([sentence, "", *(f"{name:<6} {value}" for name, value in facts.items()), "", details])
    with contextlib.suppress(OSError):
        run.logs.mkdir(parents=True, exist_ok=True)
        try:
            with open(run.failure, "x", encoding="utf-8") as file:
                file.write(text.rstrip() + "\n")
        except FileExistsError:
            return
        if not isinstance(error, NotOwner) and another(run) is None:
            run.end_status("failed", sentence, may_succeed(error), step)


def forget(run: RunDirectory) -> None:
    """Move what an earlier start left away to failure.previous.txt."""
    with contextlib.suppress(OSError):
        os.replace(run.failure, run.failure.with_name("failure.previous.txt"))


def describe(error: BaseException) -> str:
    """One line about an error: a UserError's own sentence, else its type and first line."""
    if isinstance(error, UserError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def may_succeed(error: BaseException) -> bool:
    """Whether the same start could succeed elsewhere or later: machines, GPUs and links fail, programs do not heal."""
    return isinstance(error, (MachineFault, dist.DistError, torch.AcceleratorError))
