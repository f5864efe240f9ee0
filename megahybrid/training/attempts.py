"""The starts of a run, and an end to restarts that lead nowhere."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import Any

from megahybrid.files import write_text
from megahybrid.retry import retry
from megahybrid.training import checkpoint_folder, failures
from megahybrid.training.run_directory import RunDirectory


def begin(run: RunDirectory, step: int, world: int, restarts: int) -> str | None:
    """Note a start of a submitted job from the checkpoint of `step`; called by the main process.

    Returns a sentence when the same submission has been restarted from there `restarts` times already. Starts that
    somebody makes by hand (without MEGAHYBRID_SUBMISSION) are not counted.
    """
    if _submission() is None:
        return None
    if len(before := _starts_in_a_row(run, step)) > restarts:
        return _giving_up(run, before)
    nodes = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
    place = {"nodes": nodes, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "processes": world}
    _append(run, {**place, "step": step, "last_word": run.read_status().get("time")})
    return None


def note_lost(run: RunDirectory, restarts: int) -> str | None:
    """Note a start of a submitted job that has ended before `begin` could; returns a sentence as `begin` does."""
    if _submission() is None or has_begun(run):
        return None
    _append(run, {"step": None})
    starts = _starts_in_a_row(
        run, retry(lambda: checkpoint_folder.current_step(run.checkpoints), f"Reading {run.path}")
    )
    return _giving_up(run, starts) if len(starts) > restarts else None


def has_begun(run: RunDirectory) -> bool:
    """Whether the processes of this start had met and noted it."""
    return any(each.get("start") == run.start and each.get("step") is not None for each in read(run))


def _starts_in_a_row(run: RunDirectory, step: int) -> list[dict[str, Any]]:
    """The last starts of this submission that went on from `step`, the newest first.

    Those that ended before they knew where they would go on count with the others.
    """
    found = []
    for start in (each for each in reversed(read(run)) if "step" in each):
        if start["submission"] != _submission() or start["step"] not in (step, None):
            break
        found.append(start)
    return found


def _giving_up(run: RunDirectory, starts: list[dict[str, Any]]) -> str:
    step = next((f" from step {each['step']}" for each in starts if each["step"] is not None), "")
    last = starts[0]["start"]
    failure = failures.read(run, last)
    why = f"by this ({run.failure_of(last)}): {failure.cause.rstrip('.')}" if failure else "without a word"
    return (
        f"{run.path} was started {len(starts)} times{step} without reaching another checkpoint, the last time ended "
        f"{why}; mend that and submit it again."
    )


def note_rollback(run: RunDirectory, step: int) -> None:
    """Note that the run went back to a step, which train.resume_from asked for."""
    _append(run, {"back_to": step, "torchrun": os.environ.get("TORCHELASTIC_RUN_ID")})


def has_gone_back(run: RunDirectory, step: int) -> bool:
    """Whether this submission went back to that step already: its later starts go on from the latest checkpoint.

    What is started by hand goes back every time, but for the restarts of torchrun.
    """
    before = [each for each in read(run) if each.get("back_to") == step and each["submission"] == _submission()]
    if _submission() is not None:
        return bool(before)
    restarts, torchrun = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("RESTART_COUNT", "RUN_ID"))
    return int(restarts or 0) > 0 and any(each["torchrun"] == torchrun for each in before)


def lasted(run: RunDirectory) -> list[tuple[dict[str, Any], float]]:
    """The starts of submitted jobs, each with the seconds that it lasted, to its last word in status.json."""
    starts = [each for each in read(run) if "processes" in each]
    last_words = [each["last_word"] for each in starts[1:]] + [run.read_status().get("time")]
    return [
        (start, max(0.0, (last_word or 0.0) - start["time"]))
        for start, last_word in zip(starts, last_words, strict=False)
    ]


def _submission() -> str | None:
    return os.environ.get("MEGAHYBRID_SUBMISSION")


def _append(run: RunDirectory, facts: dict[str, Any]) -> None:
    """Add a line; what is there is written anew with it, since a torn one would spoil the next."""
    ours = {"submission": _submission(), "job": os.environ.get("SLURM_JOB_ID"), "start": run.start}
    lines = [*read(run), {**ours, **facts, "time": time.time()}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    retry(lambda: write_text(run.attempts, text), f"Writing {run.attempts}")


def read(run: RunDirectory) -> list[dict[str, Any]]:
    """All starts and rollbacks so far, the oldest first; a line that is not whole is left out."""
    try:
        text = retry(lambda: run.attempts.read_text(encoding="utf-8"), f"Reading {run.attempts}")
    except FileNotFoundError:
        return []
    attempts = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            attempts.append(json.loads(line))
    return attempts
