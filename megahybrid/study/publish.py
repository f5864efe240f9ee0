"""A study's report in W&B: a run of the study's group with the pictures, and a table of runs with links to theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megahybrid.config import Config
from megahybrid.study.cells import RUNS
from megahybrid.study.results import Results
from megahybrid.study.table import COLUMNS
from megahybrid.training import checkpoint, checkpoint_folder
from megahybrid.training.tracking import add_to_summary


def publish(results: Results, folder: Path, base: Config, pictures: Sequence[Path]) -> None:
    """Put the report of a study into W&B, into the same run every time; silent where W&B is off or fails.

    Args:
        base: the study's base recipe, whose tracking keys count; the study's name is the group.
        pictures: the PNG files of the report.
    """
    tracking = replace(base.tracking, name=f"{results.study} report", group=results.study)
    recipe = replace(base, tracking=tracking)
    add_to_summary(recipe, folder, f"report-{results.study}", lambda wandb: summary(wandb, results, pictures))


def summary(wandb: Any, results: Results, pictures: Sequence[Path]) -> dict[str, Any]:
    """By name, what the run's summary gets: `runs` and the pictures."""
    rows = [[*(getattr(run, name) for name in COLUMNS), _page(wandb.run, RUNS / run.run)] for run in results.runs]
    return {
        "runs": wandb.Table(columns=[*COLUMNS, "link"], data=rows),
        **{path.stem: wandb.Image(str(path)) for path in pictures},
    }


def _page(report: Any, run: Path) -> str:
    """The page of a run in W&B beside that of the report; empty where one of them has none."""
    newest = None if report.settings._offline else checkpoint_folder.find(run)
    known = checkpoint.position(newest).tracking_id if newest else None
    return f"{report.url.rpartition('/')[0]}/{known}" if known else ""
