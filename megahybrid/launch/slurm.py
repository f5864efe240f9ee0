"""Slurm's own commands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahybrid.errors import UserError

_SECONDS = 60.0  # for a question that changes nothing


@dataclass(frozen=True)
class QueuedJob:
    """A job that Slurm knows of.

    Attributes:
        id: the job's number, of an element of a job array its own.
        state: Slurm's word, such as RUNNING.
        reason: why it waits.
        comment: the submission that it belongs to.
        array: the job array and its elements that this is, or None; those that wait are one job.
        restarts: how often it was put back into the queue.
    """

    id: str
    state: str
    reason: str
    comment: str
    array: tuple[str, Sequence[range]] | None
    restarts: int

    def is_for(self, run: dict[str, Any]) -> bool:
        """Whether it is of a run, of whose submission that is the record (submit.py)."""
        ours = self.array is None or any(run.get("element", 0) in each for each in self.array[1])
        return ours and self.comment == run["submission"]


def sbatch(script: Path, *options: str) -> str:
    """Submit a script; returns the job's number. Raises UserError with sbatch's own words when it refuses."""
    said = _call(["sbatch", "--parsable", *options, str(script)])
    return said.strip().split(";")[0]


def sbatch_accepts(script: str) -> None:
    """Raise UserError where sbatch would refuse a script of this text; nothing is submitted."""
    _call(["sbatch", "--test-only"], script)


def jobs() -> list[QueuedJob]:
    """The jobs that Slurm still remembers, ended ones too. Raises UserError where Slurm cannot be asked."""
    said = _call(["squeue", "-t", "all", "--json"], seconds=_SECONDS)
    try:
        return [
            QueuedJob(
                id=str(job["job_id"]),
                state=" ".join(job["job_state"]) if isinstance(job["job_state"], list) else job["job_state"],
                reason=job.get("state_reason", ""),
                comment=job.get("comment", ""),
                array=_array(job),
                restarts=_number(job.get("restart_cnt")) or 0,
            )
            for job in json.loads(said)["jobs"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("squeue --json did not give a list of jobs; Slurm 21.08 or newer does.") from error


def cancel(job: str) -> None:
    """Cancel a job. Raises UserError."""
    _call(["scancel", job])


def _array(job: dict) -> tuple[str, Sequence[range]] | None:
    array, element = _number(job.get("array_job_id")), _number(job.get("array_task_id"))
    if not array:
        return None
    return str(array), _elements(job.get("array_task_string", "")) if element is None else [range(element, element + 1)]


def _elements(text: str) -> list[range]:
    """Those of "2-5,7,9-15:2%4"; squeue ends a long one with "...", for whatever may follow."""
    found = re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", text.partition("%")[0])
    ranges = [range(int(first), int(last or first) + 1, int(step or 1)) for first, last, step in found]
    return [*ranges, range(ranges[-1].start, sys.maxsize)] if "..." in text else ranges


def _number(value: object) -> int | None:
    """A number of squeue's JSON, which newer versions wrap in {"set": …, "number": …}."""
    if isinstance(value, dict):
        return value["number"] if value.get("set") else None
    return value if isinstance(value, int) else None


def _call(command: list[str], given: str | None = None, seconds: float | None = None) -> str:
    if shutil.which(command[0]) is None:
        raise UserError(f"The command {command[0]} is not here; run this on a host of a Slurm cluster.")
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} did not answer within {seconds:g} s; try again later.") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise UserError(f"{command[0]} refused: {lines[-1].removeprefix(f'{command[0]}: ')}.")
    return done.stdout
