"""The folder of a run's checkpoints: which one is current, which ones stay, and what a rollback leaves behind.

    checkpoints/step_00000100/   the checkpoints (checkpoint.py says what is in one)
    checkpoints/latest           the name of the one from which the run goes on
    checkpoints/abandoned/       those past a step to which the run went back

A run goes on from what `latest` names, which moves once a checkpoint is complete; before there is such a file, from the
newest one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megahybrid.config.schema import CheckpointConfig
from megahybrid.errors import UserError
from megahybrid.files import sync_folder, write_text

ABANDONED = "abandoned"
TOKENIZER = "tokenizer.json"


class NoCheckpoint(UserError):
    """A step is named of which there is no checkpoint."""


def name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step of the checkpoint in a folder of that name."""
    return int(folder.name.removeprefix("step_"))


def find(path: Path) -> Path | None:
    """The checkpoint that a path means: itself, a run directory's or a checkpoints folder's latest, or None.

    Raises UserError where `latest` names one that is not there.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / "checkpoint.json").is_file():
            return folder
        if (folder / "latest").is_file():
            found = folder / current(folder)
            if not (found / "checkpoint.json").is_file():
                raise UserError(f"'{found}' is not whole; {others(found)}.")
            return found
        if found := whole(folder):  # the process ended before it could say so
            return found[-1]
    return None


def find_step(folder: Path, step: int, key: str) -> Path:
    """The checkpoint of a step in a run's checkpoints folder, which the value of `key` means. Raises NoCheckpoint
    where there is none."""
    found = folder / name(step)
    if not (found / "checkpoint.json").is_file():
        steps = ", ".join(str(step_of(each)) for each in whole(folder)) or "none"
        raise NoCheckpoint(f"{key} is {step}, but '{folder}' has no checkpoint of that step; it has {steps}.")
    return found


def current(folder: Path) -> str:
    """What `latest` names; "" where there is no such file."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "latest").read_text(encoding="utf-8").strip()
    return ""


def whole(folder: Path) -> list[Path]:
    """The complete checkpoints, the oldest first."""
    return [each for each in _named(folder) if (each / "checkpoint.json").is_file()]


def current_step(folder: Path) -> int:
    """The step of what `latest` names; 0 where there is no such file."""
    checkpoint = current(folder)
    return step_of(folder / checkpoint) if checkpoint else 0


def _named(folder: Path) -> list[Path]:
    return [each for each in sorted(folder.glob("step_*")) if each.name.removeprefix("step_").isdigit()]


def others(damaged: Path) -> str:
    """What to do about a damaged checkpoint."""
    steps = [str(step_of(each)) for each in whole(damaged.parent) if each != damaged]
    if steps:
        return f"train.resume_from={steps[-1]} goes on from an older one (there are {', '.join(steps)})"
    return "there is no other one beside it: start again in another run.dir"


def make_current(folder: Path, checkpoint: str) -> None:
    """Name a checkpoint as the one from which the run goes on."""
    if current(folder) != checkpoint:
        write_text(folder / "latest", checkpoint + "\n")


def remove_old(folder: Path, config: CheckpointConfig) -> None:
    """Keep the newest checkpoints, the milestones, and what `latest` names."""
    passing = [each for each in _named(folder) if not _stays(step_of(each), config)]
    for old in passing[: -config.keep]:
        if old.name != current(folder):
            _remove(old)


def _stays(step: int, config: CheckpointConfig) -> bool:
    return step in config.milestones or (config.milestone_every > 0 and step % config.milestone_every == 0)


def milestones(config: CheckpointConfig, steps: int) -> int:
    """How many checkpoints of a run of `steps` stay for ever."""
    saved = {*range(config.every, steps + 1, config.every), *config.milestones, steps}
    return sum(_stays(step, config) for step in saved)


def later(folder: Path, step: int) -> list[Path]:
    """The checkpoints past a step, the oldest first."""
    return [each for each in _named(folder) if step_of(each) > step]


def abandon(folder: Path, checkpoints: Sequence[Path], keep: int) -> None:
    """Move checkpoints to abandoned/, of which the newest `keep` stay."""
    abandoned = folder / ABANDONED
    abandoned.mkdir(exist_ok=True)
    for each in checkpoints:
        _remove(abandoned / each.name)
        os.utime(each)  # its age there
        os.replace(each, abandoned / each.name)
    for changed in (abandoned, folder):
        sync_folder(changed)
    for old in _by_age(abandoned)[:-keep]:
        _remove(old)


def _by_age(abandoned: Path) -> Sequence[Path]:
    return sorted(_named(abandoned), key=lambda each: (each.stat().st_mtime_ns, each.name))


def _remove(checkpoint: Path) -> None:
    """Never half a checkpoint under its own name."""
    trash = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(trash, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.replace(checkpoint, trash)
    shutil.rmtree(trash, ignore_errors=True)
