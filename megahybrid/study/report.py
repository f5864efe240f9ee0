"""The report of a study: report.md and its pictures, from runs.csv, plan.csv, prediction.json and fit.json alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from megahybrid.config import Config
from megahybrid.files import write_text
from megahybrid.study import hours
from megahybrid.study.answers import (
    answers,
    baseline_range,
    covered,
    error,
    in_hours,
    listed,
    open_questions,
    savings,
    why,
)
from megahybrid.study.drawing import power
from megahybrid.study.pictures import draw
from megahybrid.study.publish import publish
from megahybrid.study.results import Results, read_results
from megahybrid.training.drawing import short_number

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
    if _content(folder / "report.md") != before or not (folder / "wandb").is_dir():
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
        *_equal_loss(results),
        *_frozen(results),
        *_targets(results),
        *_fits(results),
        *_left_out(results),
        "## Pictures",
        *(f"![{name}]({name}.png)\n\n{CAPTIONS[name]}" for name in pictures),
        *_made(results, file),
    ]
    return "\n\n".join(parts) + "\n"


def _equal_loss(results: Results) -> Iterator[str]:
    if not results.fit.get("multipliers"):
        return
    low, high = baseline_range(results)
    last = max(point["flops"] for points in results.fit["multipliers"].values() for point in points)
    base, rows = next(iter(results.fit["multipliers"])).split(" vs ")[0], []
    for flops in (low, high, *[last] * (last > high)):
        for saving in savings(results, flops):
            where = power(flops) + ("" if flops <= high else ", beyond the fitted runs")
            rows.append([saving.kind, where, str(saving), str(in_hours(results, saving) or "not measured")])
    yield "## Cost of the same loss"
    yield f"Times what {base} needs, with 95 % intervals; GPU hours as measured, whose ratio counts as exact."
    yield _table(["kind", f"FLOPs of {base}", "times the FLOPs", "times the GPU hours"], rows)


def _frozen(results: Results) -> Iterator[str]:
    rows = []
    for run in results.runs:
        if run.cell not in results.frozen:
            continue
        frozen = results.frozen[run.cell]
        row = [run.cell, power(run.flops), f"{frozen['loss']:.4f}", _interval(frozen["interval"], ".4f")]
        if run.counts:
            row += [f"{run.loss:.4f}", f"{100 * error(results, run):+.2f} %", _yes(covered(results, run))]
        rows.append(row + [why(run), "", ""] * (not run.counts))
    if rows:
        yield "## Frozen predictions"
        yield "Written before these runs started. The error is positive where the loss came higher than predicted."
        yield _table(["run", "FLOPs", "predicted", "95 % interval", "actual", "error", "inside"], rows)


def _targets(results: Results) -> Iterator[str]:
    rows = []
    for kind in results.kinds:
        for each in results.fit["kinds"][kind]["predictions"]:
            if not each.get("cell"):
                size = [short_number(each[name], 0) for name in ("parameters", "tokens")]
                rows.append(
                    [kind, *size, power(each["flops"]), f"{each['loss']:.4f}", _interval(each["interval"], ".4f")]
                )
    if rows:
        yield "## Targets"
        yield _table(["kind", "parameters", "tokens", "FLOPs", "loss", "95 % interval"], rows)


def _fits(results: Results) -> Iterator[str]:
    names = {"a_opt": ".3f", "E": ".3f", "A": ".4g", "B": ".4g", "alpha": ".3f", "beta": ".3f"}
    rows = []
    for kind in results.kinds:
        law = results.fit["kinds"][kind]
        values = [f"{law[name]:{how}} ({_interval(law['intervals'][name], how)})" for name, how in names.items()]
        rows.append([kind, str(law["runs"]), *values, power(law["condition"]), power(law["objective"])])
    yield "## Fits"
    yield (
        "L = E + A/N^alpha + B/D^beta, with 95 % intervals. Compare a_opt and losses between studies; E, alpha and "
        "beta move with noise and with what is counted as a parameter."
    )
    yield _table(["kind", "runs", *names, "condition", "objective"], rows)


def _left_out(results: Results) -> Iterator[str]:
    rows = [
        [run.cell, run.run, run.state, why(run), f"{run.loss:.4f}" if run.loss == run.loss else "", run.retry_of]
        for run in results.runs
        if not run.counts
    ]
    if rows:
        yield "## Left out"
        yield _table(["run", "folder", "state", "why", "loss", "retry of"], rows)


def _made(results: Results, file: Path) -> Iterator[str]:
    yield "## How it was made"
    commands = "\n".join(f"megahybrid study {verb} {file}" for verb in ("plan", "launch", "collect", "fit", "report"))
    yield f"```sh\n{commands}\n```"
    versions = sorted({run.code_version for run in results.runs if run.code_version})
    used, planned = hours.by_use(results.runs), hours.planned(results)
    totals = {name: sum(part.values()) for name, part in used.items()}
    split = listed([f"{value:.3g} {name}" for name, value in totals.items()])
    plan = f", of {sum(planned.values()):.3g} planned" if planned else ""
    yield _list(
        [
            f"Code of the runs: {listed(versions) if versions else 'unknown'}.",
            f"GPU hours: {sum(totals.values()):.3g}{plan}: {split}.",
        ]
    )
    kinds = defaultdict(float)
    for part in used.values():
        for (kind, _), value in part.items():
            kinds[kind] += value
    expected = defaultdict(float)
    for (kind, _), value in planned.items():
        expected[kind] += value
    yield _table(
        ["kind", "planned, h", "used, h"],
        [[kind, f"{expected[kind]:.3g}" if planned else "", f"{value:.3g}"] for kind, value in kinds.items()],
    )


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _interval(ends: Sequence[float], how: str) -> str:
    return f"{ends[0]:{how}} to {ends[1]:{how}}"


def _yes(true: bool) -> str:
    return "yes" if true else "no"
