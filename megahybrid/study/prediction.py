"""prediction.json: what the law says of the runs that are held out, written before they begin and never again."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megahybrid import code_version
from megahybrid.errors import UserError
from megahybrid.files import read_json, write_json
from megahybrid.study.collect import write_runs
from megahybrid.study.fit import fit
from megahybrid.study.outcomes import Outcome


def is_frozen(folder: Path, outcomes: Sequence[Outcome]) -> bool:
    """Whether a prediction stands of every run that is held out. Raises UserError where that cannot be told."""
    return not _unpredicted(_frozen(folder), outcomes)


def freeze(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Fit the law to the runs that are not held out, all of which have ended, and write down what it predicts of those
    of which nothing stands yet: by cell, as fit.json has it, and which run that is and what its state was.

    Raises UserError where it cannot be fitted, or predicts nothing for one of those that are held out.
    """
    before = _frozen(folder)
    held_out = _unpredicted(before, outcomes)
    runs = write_runs(folder, outcomes)
    fitted = fit(folder)
    predictions = {
        each["cell"]: {"kind": kind, **each} for kind, law in fitted["kinds"].items() for each in law["predictions"]
    }
    if missing := [each.cell.name for each in held_out if each.cell.name not in predictions]:
        raise UserError(f"The fit says nothing of {', '.join(missing)}; see {folder / 'fit.json'}.")
    facts = {
        "frozen": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "code_version": code_version(),
        "runs_sha256": hashlib.sha256(runs.encode()).hexdigest(),
    }
    made = {
        each.cell.name: predictions[each.cell.name] | facts | {"run": each.cell.identity, "state": each.state}
        for each in held_out
    }
    write_json(folder / "prediction.json", before | made)


def _unpredicted(frozen: Mapping[str, Mapping[str, Any]], outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that are held out and of whose very run nothing stands there."""
    held_out = [each for each in outcomes if each.cell.held_out]
    return [each for each in held_out if frozen.get(each.cell.name, {}).get("run") != each.cell.identity]


def _frozen(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / "prediction.json"
    if not file.exists():
        return {}
    if (frozen := read_json(file)) is None:
        raise UserError(f"'{file}' cannot be read, and what was predicted is not predicted anew; see to that file.")
    return frozen
