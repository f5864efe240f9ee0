"""The starts of a run, and an end to restarts that lead nowhere."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from megahybrid.training.run_directory import RunDirectory


def begin(run: RunDirectory, step: int, world: int, restarts: int) -> str | None:
    """Note a start of a submitted job from the checkpoint of `step`; called by the main process.

    Returns a sentence when the same submission has been restarted from there `restarts` times already. Starts that
    somebody makes by hand (without MEGAHYBRID_SUBMISSION) are not counted.
    """
    submission = _submission()
    if submission is None:
        return None
    before = 0
    for attempt in reversed(read(run)):
        if attempt["submission"] != submission or attempt.get("step") != step:
            break
        before += 1
    if before > restarts:
        return (
            f"{run.path} was started {before} times from step {step} without reaching another checkpoint; see "
            f"{run.failure.with_name('failure.previous.txt')}, mend the cause and submit it again."
        )
    nodes = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
    _append(run, {"nodes": nodes, "processes": world, "step": step})
    return None


def note_rollback(run: RunDirectory, step: int) -> None:
    """Note that the run went back to a step, which train.resume_from asked for."""
    _append(run, {"back_to": step})


def has_gone_back(run: RunDirectory, step: int) -> bool:
    """Whether this submission went back to that step already: its later starts go on from the latest checkpoint.

    What is started by hand goes back every time, but for the restarts of torchrun.
    """
    submission = _submission()
    if submission is None:
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return any((each["submission"], each.get("back_to")) == (submission, step) for each in read(run))


def _submission() -> str | None:
    return os.environ.get("MEGAHYBRID_SUBMISSION")


def _append(run: RunDirectory, facts: dict[str, Any]) -> None:
    line = {"submission": _submission(), "job": os.environ.get("SLURM_JOB_ID"), **facts, "time": time.time()}
    run.path.mkdir(parents=True, exist_ok=True)
    with open(run.attempts, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(run: RunDirectory) -> list[dict[str, Any]]:
    """All starts and rollbacks so far, the oldest first; a line that is not whole is left out."""
    attempts = []
    if run.attempts.exists():
        for line in run.attempts.read_text(encoding="utf-8").splitlines():
            try:
                attempts.append(json.loads(line))
            except ValueError:
                continue
    return attempts
