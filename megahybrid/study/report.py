"""The report of a study: report.md and its pictures, from runs.csv, plan.csv, prediction.json and fit.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megahybrid.config import Config
from megahybrid.files import write_text
from megahybrid.study import hours
from megahybrid.study.answers import answers, listed, open_questions
from megahybrid.study.pictures import draw
from megahybrid.study.results import Results, read_results
from megahybrid.study.tables import tables

CAPTIONS = {
    "isoflop": "Loss over parameters at each budget. Solid: a parabola through runs of equal FLOPs; dashed: the law.",
    "compute": "Loss over compute, and the lowest loss that each law gives at some FLOPs, with its 95 % interval.",
    "optimum": "The best number of parameters and of tokens.",
    "multiplier": "What each kind needs for the loss of the baseline. Grey: beyond the fitted runs.",
    "prediction": "Predicted and actual losses, and each frozen prediction with its 95 % interval.",
    "residuals": "What the law leaves over. Look for a bend or a slope: noise has neither.",
    "learning_rate": "Loss over the learning rate.",
    "branches": "Trunks (squares), their branches (dots), and the law.",
    "cost": "GPU hours, planned and used.",
}


def report(folder: Path, file: Path, base: Config) -> list[Path]:
    """Write a study's report, and put it into W&B where that is on and there is news; returns the paths of report.md
    and the pictures.

    Args:
        folder, file: as `write`.
        base: the study's base recipe, whose tracking keys count.

    Raises UserError as `write`.
    """
    before = _content(folder / "report.md")
    paths = write(folder, file)
    news = _content(folder / "report.md") != before or not (folder / "wandb").is_dir()
    if news and base.tracking.wandb != "disabled":
        from megahybrid.study.publish import publish  # loads torch and Megatron

        publish(read_results(folder), folder, base, paths[1:])
    return paths


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def write(folder: Path, file: Path) -> list[Path]:
    """Write report.md and the pictures into a study's folder; returns their paths.

    Args:
        folder: has runs.csv and fit.json, and plan.csv and prediction.json where there are any.
        file: the study file, for the commands.

    Raises UserError where a file is missing or not what its verb writes.
    """
    results = read_results(folder)
    pictures = draw(folder, results)
    write_text(folder / "report.md", text(results, file, [each.stem for each in pictures]))
    return [folder / "report.md", *pictures]


def text(results: Results, file: Path, pictures: Sequence[str]) -> str:
    """report.md."""
    parts = [
        f"# {results.study}",
        _list(answers(results)),
        "## What cannot be concluded",
        _list(open_questions(results)),
        *tables(results),
        "## Pictures",
        *(f"![{name}]({name}.png)\n\n{CAPTIONS[name]}" for name in pictures),
        *_made(results, file),
    ]
    return "\n\n".join(parts) + "\n"


def _made(results: Results, file: Path) -> Iterator[str]:
    yield "## How it was made"
    commands = "\n".join(f"megahybrid study {verb} {file}" for verb in ("plan", "launch", "collect", "fit", "report"))
    yield f"```sh\n{commands}\n```"
    versions = sorted({run.code_version for run in results.runs if run.code_version})
    used, planned = hours.by_use(results.runs), hours.planned(results)
    totals = {name: sum(part.values()) for name, part in used.items()}
    plan = f" of {sum(planned.values()):.3g} planned" if planned else ""
    split = listed([f"{value:.3g} {name}" for name, value in totals.items()])
    yield f"Code of the runs: {listed(versions) if versions else 'unknown'}. Data: {results.data or 'unknown'}."
    yield f"GPU hours: {sum(totals.values()):.3g}{plan}, {split}."


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
