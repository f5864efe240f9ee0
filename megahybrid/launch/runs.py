"""The runs under a folder at a glance, from their own files and from Slurm where it is here; no database."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megahybrid.errors import UserError
from megahybrid.files import read_json
from megahybrid.launch import slurm
from megahybrid.readable import short
from megahybrid.training import attempts
from megahybrid.training.metrics_file import lines_backwards
from megahybrid.training.ownership import another
from megahybrid.training.run_directory import RunDirectory, duration

_STALLED_SECONDS = 90.0  # a heartbeat comes every 10 s
_PIPED_WIDTH = 400
_INSIDE = {"checkpoints", "wandb", "logs", "heartbeat", "submit"}


@dataclass(frozen=True)
class Run:
    """A run directory, read.

    Attributes:
        path: the run directory.
        state: queued, running, stalled, requeued, stopped, done or failed; submitted where only Slurm knows more.
        reason: why, if there is a why.
        step, target: optimizer steps.
        last: the last line of metrics.jsonl, or {}.
        jobs: the Slurm jobs that have trained it or will, the newest last.
    """

    path: Path
    state: str
    reason: str
    step: int
    target: int
    last: dict[str, Any]
    jobs: tuple[str, ...]


def find(folder: Path, say: Callable[[str], None] = print) -> list[Run]:
    """The runs in `folder`, itself included, by path; `say` is told where Slurm is here but gives no answer.

    Raises UserError where there is none.
    """
    jobs = queued_jobs(say)
    runs = [read(path, jobs) for path in _directories(folder)]
    if not runs:
        raise UserError(f"There is no run in '{folder}'; give a folder of run directories.")
    return runs


def queued_jobs(say: Callable[[str], None] = print) -> list[slurm.QueuedJob] | None:
    """Slurm's jobs, None where it cannot be asked; `say` is told where it is here but gives no answer."""
    if shutil.which("squeue") is None:
        return None
    try:
        return slurm.jobs()
    except UserError as error:
        say(f"The queue is not known, states are those that the runs' own files tell: {error}")
        return None


def show(runs: Sequence[Run], console: Console | None = None) -> None:
    """Print a table, a row a run."""
    console = console or Console()
    if not console.is_terminal and "COLUMNS" not in os.environ and console.width < _PIPED_WIDTH:
        console.width = _PIPED_WIDTH  # a line a run, for grep and awk
    table = Table(box=None, header_style="bold")
    table.add_column("run", overflow="fold")
    for name in ("state", "step", "tokens", "tokens/s", "MFU", "loss", "left", "job"):
        table.add_column(name, justify="left" if name in ("state", "job") else "right", no_wrap=name != "job")
    table.add_column("why", overflow="fold")
    for run in runs:
        table.add_row(str(run.path), *_row(run))
    console.print(table)


def left(run: Run) -> str:
    """How long a run that trains will still take; "" of another."""
    last = run.last
    if run.state != "running" or not last:
        return ""
    a_step = last["tokens"] / last["step"] / last["tokens_per_second"]
    return duration((run.target - last["step"]) * a_step)


def _row(run: Run) -> list[str]:
    last = run.last
    of_tokens = last["tokens"] / last["step"] * run.target if last else 0
    return [
        run.state,
        f"{run.step}/{run.target}" if run.target else "",
        f"{short(last['tokens'])}/{short(of_tokens)}" if last else "",
        f"{last['tokens_per_second']:,.0f}" if last else "",
        f"{100 * last['mfu']:.1f} %" if "mfu" in last else "",
        f"{last['loss']:.4f}" if last else "",
        left(run),
        ", ".join(run.jobs),
        run.reason,
    ]


def _directories(folder: Path) -> Iterator[Path]:
    for path, inner, files in os.walk(folder):
        if "status.json" in files or any(
            Path(path).glob("submit/*/job.json")
        ):  # an array has its code in such a folder
            yield Path(path)
        inner[:] = sorted(each for each in inner if each not in _INSIDE)


def read(path: Path, queue: Sequence[slurm.QueuedJob] | None) -> Run:
    """The run in a directory, which may not be there yet."""
    run = RunDirectory(path)
    status = read_json(run.status) or {}  # one run that cannot be read now does not hide the others
    submitted = [read_json(each) for each in sorted(path.glob("submit/*/job.json"))]
    mine = [job for job in queue or () for facts in submitted if facts and job.is_for(facts)]
    state, reason = _state(run, status, None if queue is None else mine)
    known = [number for facts in submitted if facts for number in facts["jobs"]]
    started = [attempt["job"] for attempt in attempts.read(run) if attempt["job"]]
    jobs = tuple(dict.fromkeys([*started, *(job.id for job in mine), *known]))
    return Run(
        path, state, reason, status.get("step", 0), status.get("target", 0), _last_metrics(run.metrics), jobs[-3:]
    )


def _state(run: RunDirectory, status: dict[str, Any], jobs: Sequence[slurm.QueuedJob] | None) -> tuple[str, str]:
    """A run's state and why; `jobs` are those of its submissions, None where Slurm cannot be asked."""
    told, reason = status.get("state"), status.get("reason", "")
    if told == "done":
        return told, reason
    if jobs is None:
        return _state_by_files(run, status)
    if any(job.state in ("RUNNING", "COMPLETING") for job in jobs):
        silent = _silence(run, status)
        if told == "running" and silent > _STALLED_SECONDS:
            return "stalled", f"no heartbeat for {duration(silent)}"
        return "running", ""
    waiting = [job for job in jobs if job.state == "PENDING"]
    if waiting:
        why = f"{waiting[0].reason}" + (f"; before: {reason}" if reason else "")
        return ("requeued" if status else "queued"), why
    if told == "running":
        ended = bool(status.get("job")) or another(run) is None
        return ("failed", "it ended without a word") if ended else ("running", "")
    if told is None:
        ended = next((job for job in jobs), None)
        return "failed", f"the job ended before training began ({ended.state.lower()})" if ended else "never started"
    return told, reason


def _state_by_files(run: RunDirectory, status: dict[str, Any]) -> tuple[str, str]:
    """As `_state`, without a word from Slurm."""
    if not status:
        return "submitted", "the queue is not known"
    if status["state"] != "running":
        return status["state"], status["reason"]
    if not status.get("job") and another(run) is None:
        return "failed", "it ended without a word"
    if (silent := _silence(run, status)) > _STALLED_SECONDS:
        return "stalled", f"no heartbeat for {duration(silent)}; the queue is not known"
    return "running", status["reason"]


def _silence(run: RunDirectory, status: dict[str, Any]) -> float:
    """Seconds since the last heartbeat or status."""
    beats = [path.stat().st_mtime for path in run.heartbeats.glob("rank_*.json")]
    return time.time() - max([*beats, status.get("time", 0)])


def _last_metrics(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError):
        return next(lines_backwards(path), {})
    return {}
