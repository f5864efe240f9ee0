"""The folder of an evaluation: what it was made with, and a line a sample, which an interrupted one goes on from.

settings.json    model, precision, window, and the parameters of every task: what the lines of all starts share
TASK.jsonl       a line a sample
results.json     what the lines say together, costs by length, machine, versions
*.png            pictures of it
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megahybrid.errors import UserError
from megahybrid.evaluation.results import Line
from megahybrid.files import read_json, write_json

Key = tuple[str, str, int, float | None, int]


def key_of(line: Line) -> Key:
    """What no two lines of a task share: mode, policy, length, depth, index."""
    return line["mode"], line["policy"], line["length"], line["depth"], line["index"]


class Folder:
    """An evaluation's folder; one process writes it."""

    def __init__(self, path: Path):
        self.path = path
        self._settings: dict[str, Any] = {}

    def open(self, model: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> None:
        """Have the lines of these tasks be of this model; settings.json says so from the first of them on.

        Raises UserError where the folder holds lines that were made with something else, or of which settings.json
        does not say with what, and where it cannot be made.
        """
        file = self.path / "settings.json"
        found = read_json(file) or {"model": model, "tasks": {}}
        for path in sorted(self.path.glob("*.jsonl")):
            self._refuse(path.name, "" if path.stem in found["tasks"] else "settings.json does not say of what")
        self._refuse("what another model or --dtype gave", _change(found["model"], model))
        for name in tasks.keys() & found["tasks"].keys():
            self._refuse(f"{name} with other settings", _change(found["tasks"][name], tasks[name]))
        above = next(each for each in (self.path, *self.path.absolute().parents) if each.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise UserError(f"'{self.path}' cannot be written; give another with --out.")
        self._settings = json.loads(json.dumps({"model": model, "tasks": {**found["tasks"], **tasks}}))
        for name in tasks:
            _cut_torn_line(self._lines(name))

    def _refuse(self, what: str, why: str) -> None:
        if why:
            raise UserError(f"'{self.path}' holds {what} ({why}); give --out another folder.")

    def tasks(self) -> list[str]:
        """The tasks that it may have lines of."""
        return sorted((read_json(self.path / "settings.json") or {"tasks": ()})["tasks"])

    def read(self, task: str) -> list[Line]:
        """The whole lines of a task."""
        if not self._lines(task).exists():
            return []
        with open(self._lines(task), encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.endswith("\n")]

    def add(self, task: str, lines: Sequence[Line]) -> None:
        """Append lines, durably. Raises UserError where the disk does not take them."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            if read_json(self.path / "settings.json") != self._settings:
                write_json(self.path / "settings.json", self._settings)
            with open(self._lines(task), "a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as fault:
            raise UserError(
                f"'{self._lines(task)}' could not be written ({fault.strerror}); make room and start again: "
                "what is done stays."
            ) from fault

    def _lines(self, task: str) -> Path:
        return self.path / f"{task}.jsonl"


def _cut_torn_line(path: Path) -> None:
    """Remove what a write that was interrupted has left behind the last whole line."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.flush()
        os.fsync(file.fileno())


def _change(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """The first difference of two settings, in words; "" where there is none."""
    new = json.loads(json.dumps(new))
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            if inner := _change(before, now, f"{prefix}{name}."):
                return inner
        elif before != now:
            return f"{prefix}{name} was {json.dumps(before)}, it is {json.dumps(now)}"
    return ""
