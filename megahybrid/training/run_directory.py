"""The run directory: where everything of a run lies, its metrics and its status."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from megahybrid.errors import UserError
from megahybrid.files import write_json
from megahybrid.training import metrics_file

Metrics = list[dict[str, Any]]


class RunDirectory:
    """Paths and small files of one run.

    Attributes:
        by_hand: names the start of the run that this process belongs to where no job does; all its processes have to
            agree on it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.status = self.path / "status.json"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.failure = self.logs / "failure.txt"  # the newest of all starts
        self.heartbeats = self.path / "heartbeat"
        self.attempts = self.path / "attempts.jsonl"
        self.owner = self.path / "owner.json"
        self.traces = self.path / "traces"
        self.by_hand = f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}"

    @property
    def start(self) -> str:
        """The name of this start, which no other start of the run has: the job's number and how often it was requeued,
        or `by_hand`.
        """
        job = os.environ.get("SLURM_JOB_ID")
        return f"{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else self.by_hand

    def failure_of(self, start: str) -> Path:
        """Where a start's first failure is recorded (failures.py)."""
        return self.logs / "failures" / f"{start}.txt"

    def write_status(self, state: str, step: int, target: int, reason: str = "", again: bool = False) -> None:
        """Write status.json; nothing but `failed` once a process of this start has failed.

        Args:
            state: running, stopped (asked to, will go on), done or failed.
            step: the last finished step, of `target`.
            reason: why, if there is a why.
            again: whether a failed run may succeed when it is started again.
        """
        if state != "failed" and os.path.exists(self.failure_of(self.start)):
            return
        write_json(
            self.status,
            {
                "state": state,
                "step": step,
                "target": target,
                "reason": reason,
                "again": again,
                "job": os.environ.get("SLURM_JOB_ID"),
                "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
                "process": os.getpid(),
                "time": time.time(),
            },
        )

    def read_status(self) -> dict[str, Any]:
        """What status.json says; {} where there is none, or not a whole one. Raises OSError where it cannot tell."""
        try:
            return json.loads(self.status.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}

    def end_status(self, state: str, reason: str, again: bool = False, step: int | None = None) -> None:
        """Write status.json with another state and reason, where not told otherwise at the step that it has."""
        last = self.read_status()
        self.write_status(state, last.get("step", 0) if step is None else step, last.get("target", 0), reason, again)

    def cut_metrics(self, step: int) -> None:
        """Remove the lines after `step`: training goes on from there."""
        if step == 0:
            self.metrics.unlink(missing_ok=True)
        elif self.metrics.exists():
            metrics_file.cut(self.metrics, step)


def read_metrics(run_dir: Path) -> Metrics:
    """All lines of metrics.jsonl, a dictionary a step; a last line that is still being written is left out.

    Raises UserError when the file is missing, empty or broken elsewhere.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"There is no {path}; give the directory of a run that has trained.")
    metrics, torn = [], None
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if torn is not None:
                raise UserError(f"Line {torn} of {path} is not JSON; remove that line.")
            try:
                metrics.append(json.loads(line))
            except ValueError:
                torn = number
    if not metrics:
        raise UserError(f"{path} holds no finished step yet; wait for the first one.")
    return metrics


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
