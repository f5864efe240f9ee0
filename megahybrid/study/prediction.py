"""prediction.json: what the law says of the runs that are held out, written before they begin and never again."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megahybrid import code_version
from megahybrid.errors import UserError
from megahybrid.files import read_json, write_json
from megahybrid.study.collect import write_runs
from megahybrid.study.fit import fit
from megahybrid.study.outcomes import Outcome


def is_frozen(folder: Path, outcomes: Sequence[Outcome]) -> bool:
    """Whether a prediction stands of every run that is held out."""
    return _held_out(outcomes) <= _frozen(folder).keys()


def freeze(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Fit the law to the runs that are not held out, all of which have ended, and write down what it predicts of those
    of which nothing stands yet: by cell, at least loss and interval.

    Raises UserError where it cannot be fitted, or predicts nothing for one of those that are held out.
    """
    before = _frozen(folder)
    held_out = sorted(_held_out(outcomes) - before.keys())
    runs = write_runs(folder, outcomes)
    fitted = fit(folder)
    predictions = {
        each["cell"]: {"kind": kind, **each} for kind, law in fitted["kinds"].items() for each in law["predictions"]
    }
    if missing := [name for name in held_out if name not in predictions]:
        raise UserError(f"The fit says nothing of {', '.join(missing)}; see {folder / 'fit.json'}.")
    facts = {
        "frozen": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "code_version": code_version(),
        "runs_sha256": hashlib.sha256(runs.encode()).hexdigest(),
    }
    write_json(folder / "prediction.json", before | {name: predictions[name] | facts for name in held_out})


def _held_out(outcomes: Sequence[Outcome]) -> set[str]:
    return {each.cell.name for each in outcomes if each.cell.held_out}


def _frozen(folder: Path) -> dict[str, dict[str, Any]]:
    return read_json(folder / "prediction.json") or {}
