"""What an evaluation leaves: results.json, pictures, a table, and a copy of them in the run's W&B run."""

from __future__ import annotations

import platform
from typing import Any

import torch

from megahybrid import code_version
from megahybrid.errors import UserError
from megahybrid.evaluation import pictures
from megahybrid.evaluation.lines import Folder
from megahybrid.evaluation.results import Entry, summarise, table
from megahybrid.evaluation.subject import Subject
from megahybrid.files import read_json, write_json
from megahybrid.parallel import groups
from megahybrid.training.tracking import add_to_summary


def known_costs(folder: Folder) -> list[Entry]:
    """The costs by length that earlier starts measured, on whatever device."""
    return (read_json(folder.path / "results.json") or {}).get("costs", [])


def write(folder: Folder, subject: Subject, costs: list[Entry]) -> list[Entry]:
    """Write results.json from all lines in the folder, if there are any; returns its results; on the main process
    only, as `show`.

    Raises UserError where the disk does not take it.
    """
    results = [entry for task in folder.tasks() for entry in summarise(task, folder.read(task))]
    if not results:
        return []
    model = {**subject.settings, "step": subject.step, "path": str(subject.home)}
    costs = sorted(costs, key=lambda each: (each["device"], each["length"]))
    try:
        write_json(
            folder.path / "results.json",
            {"model": model, "results": results, "costs": costs, "machine": _machine()},
        )
    except OSError as fault:
        raise UserError(
            f"'{folder.path}' could not be written ({fault.strerror}); make room and start again: what is done stays."
        ) from fault
    return results


def show(folder: Folder, subject: Subject, costs: list[Entry], news: bool) -> None:
    """Write results.json and pictures, print the table, and put them into the run's W&B run if there are `news`."""
    results = write(folder, subject, costs)
    if not results:
        return
    here = sorted((each for each in costs if each["device"] == device()), key=lambda each: each["length"])
    drawn = pictures.draw(folder.path, results, here, subject.window)
    print(table(results))
    print(f"{folder.path}: results.json, a line a sample in *.jsonl, {', '.join(path.name for path in drawn)}")
    if news and subject.of_run:
        add_to_summary(
            subject.config, subject.home, subject.tracking_id, lambda wandb: _for_wandb(wandb, subject, results, drawn)
        )


def device() -> str:
    """What computes here."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{groups.world()[1]} x {name}"


def _machine() -> dict[str, Any]:
    return {
        "device": device(),
        "megahybrid": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _for_wandb(wandb: Any, subject: Subject, results: list[Entry], drawn: list) -> dict[str, Any]:
    """By name, pictures and a table."""
    columns = ["task", "mode", "policy", "length", "n", "accuracy", "recency_null", "nll", "kept"]
    rows = [[*(each[name] for name in columns), each["beyond"]["accuracy"]] for each in results]
    place = f"evaluation/step_{subject.step}"
    return {
        f"{place}/results": wandb.Table(columns=[*columns, "beyond"], data=rows),
        **{f"{place}/{path.stem}": wandb.Image(str(path)) for path in drawn},
    }
