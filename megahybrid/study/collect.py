"""`megahybrid study collect`: all that a study's runs came to, in runs.csv, a row a cell."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megahybrid.errors import UserError
from megahybrid.files import read_json, write_text
from megahybrid.launch import runs
from megahybrid.study.file import Study
from megahybrid.study.models import count_flops
from megahybrid.study.outcomes import Outcome, Survey, hours_by_run
from megahybrid.training import attempts, checkpoint_folder
from megahybrid.training.run_directory import RunDirectory


def collect(study: Study, say: Callable[[str], None]) -> Path:
    """Write runs.csv; the same bytes where nothing has changed. `say` is told which cells have no loss."""
    outcomes = Survey(study).look(runs.queued_jobs(say))
    folder = study.folder
    write_runs(folder, outcomes)
    for each in outcomes:
        if each.state != "done":
            say(f"{each.cell.name} is {each.state}{f': {each.why}' if each.why else ''}.")
    return folder / "runs.csv"


def write_runs(folder: Path, outcomes: Sequence[Outcome]) -> str:
    """Write a study's runs.csv; returns its text."""
    hours = hours_by_run(outcomes)
    flops = {(each.cell.kind, each.cell.size): each.cell.config for each in outcomes}
    flops = {model: count_flops(config).parts for model, config in flops.items()}
    rows = [_row(each, hours.get(each.cell.identity, 0.0), flops[each.cell.kind, each.cell.size]) for each in outcomes]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval=0, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "runs.csv", text.getvalue())
    return text.getvalue()


def _row(outcome: Outcome, hours: float, parts: Mapping[str, float]) -> dict[str, Any]:
    """A row; `parts` are FLOPs a token of its model's forward pass, and those in the row are of the whole run, a
    branch's with its trunk's, as `tokens` and `flops` are."""
    cell, config = outcome.cell, outcome.cell.config
    return {
        "cell": cell.name,
        "run": "" if cell.awaits else cell.identity,
        "kind": cell.kind,
        "size": cell.size,
        "budget": cell.budget,
        "seed": cell.seed,
        "role": cell.role,
        "trunk": "" if cell.awaits else cell.trunk,
        "held_out": int(cell.held_out),
        "retry_of": cell.retry_of or "",
        "parameters": cell.parameters,
        "parameters_without_embedding": cell.parameters_without_embedding,
        "tokens": cell.tokens,
        "flops": cell.flops,
        "flops_per_token": cell.flops_per_token,
        "learning_rate": config.optimizer.learning_rate,
        "batch_tokens": config.train.global_batch_size * config.train.seq_length,
        "steps": config.train.steps,
        "gpu_hours": "" if cell.awaits else f"{hours:.6g}",
        "loss": outcome.loss if outcome.state == "done" else "",
        "state": outcome.state,
        "excluded": _why_excluded(outcome),
        "code_version": _code_version(outcome),
        "began": "" if cell.awaits else _began(outcome),
        **{f"flops: {name}": 3 * count * cell.tokens for name, count in parts.items()},
    }


def _why_excluded(outcome: Outcome) -> str:
    """Why its loss is not one that the law should give; nothing where it is."""
    if outcome.state == "done":
        return "a run of the tuning grid" if outcome.cell.role == "tune" else ""
    return f"{outcome.state}: {outcome.why}" if outcome.why else outcome.state


def _began(outcome: Outcome) -> str:
    """When it was started first, as prediction.json has it when it was written."""
    if outcome.collected:
        return outcome.collected.began
    starts = attempts.read(RunDirectory(outcome.run.path))
    first = next((each["time"] for each in starts if each.get("step") is not None), None)
    return "" if first is None else datetime.fromtimestamp(first, UTC).isoformat(timespec="seconds")


def _code_version(outcome: Outcome) -> str:
    """Of the start that wrote the last checkpoint."""
    if outcome.collected or not outcome.run.last:
        return outcome.collected.code_version if outcome.collected else ""
    try:
        last = checkpoint_folder.find(outcome.run.path)
    except UserError:
        last = None
    return (read_json(last / "checkpoint.json") or {}).get("megahybrid", "") if last else ""
