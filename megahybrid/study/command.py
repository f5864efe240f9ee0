"""`megahybrid study VERB FILE`: the verbs and their flags."""

from __future__ import annotations

import argparse
from pathlib import Path

from megahybrid.errors import UserError
from megahybrid.files import write_json


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """A parser for each verb, whose default `run` does it."""
    verbs = verb.add_subparsers(required=True, metavar="VERB")
    text = "every run with its cost, and how well the study will predict; starts nothing"
    plan = verbs.add_parser("plan", help=text, description=text)
    plan.add_argument("file", metavar="FILE", help="a YAML file, such as recipes/studies/small.yaml")
    plan.set_defaults(run=_plan)
    _add_fit(verbs)
    text = "report.md and its pictures, from what collect and fit have written"
    report = verbs.add_parser("report", help=text, description=text)
    report.add_argument("file", metavar="FILE", help="the study's YAML file")
    report.set_defaults(run=_report)


def _add_fit(verbs: argparse._SubParsersAction) -> None:
    text = "the law of every kind's losses, with intervals and predictions; of a study or of any table of runs"
    fit = verbs.add_parser("fit", help=text, description=text)
    which = fit.add_mutually_exclusive_group(required=True)
    which.add_argument("file", nargs="?", metavar="FILE", help="the study's file; writes its fit.json")
    which.add_argument("--runs", type=Path, metavar="CSV", help="a table instead; writes CSV's name with .fit.json")
    fit.add_argument("--columns", metavar="NAME=COLUMN,…", help='such as "parameters=Model Size,flops=FLOP,loss=loss"')
    fit.add_argument("--drop-largest-losses", type=int, default=0, metavar="N", help="runs to leave out (default 0)")
    fit.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="replicates for intervals (default 1000)")
    fit.set_defaults(run=_fit)


def _plan(parsed: argparse.Namespace) -> None:
    from megahybrid.study.file import load_study

    study = load_study(parsed.file)
    from megahybrid.study.plan import plan

    print(plan(study, parsed.file))


def _fit(parsed: argparse.Namespace) -> None:
    if not (parsed.bootstrap == 0 or parsed.bootstrap >= 100):
        raise UserError(f"--bootstrap is {parsed.bootstrap}; give 0 for no intervals, or at least 100.")
    if parsed.file and (parsed.columns or parsed.drop_largest_losses or not parsed.bootstrap):
        raise UserError("--columns, --drop-largest-losses and --bootstrap 0 go with --runs, not with a study.")
    from megahybrid.study import fit, fit_text, table

    if parsed.file:
        from megahybrid.study.cells import RUNS
        from megahybrid.study.file import load_study

        folder = RUNS.parent / load_study(parsed.file).study
        found, path = fit.fit(folder, parsed.bootstrap), folder / "fit.json"
    else:
        columns = table.parse_columns(parsed.columns) if parsed.columns else None
        runs = table.read_table(parsed.runs, columns, parsed.drop_largest_losses)
        found, path = fit.fit_table(runs, (), parsed.bootstrap), parsed.runs.with_suffix(".fit.json")
        write_json(path, found)
    print(fit_text.describe(found))
    print(f"\n{path}")


def _report(parsed: argparse.Namespace) -> None:
    from megahybrid.config import load_config
    from megahybrid.study.file import load_study

    study = load_study(parsed.file)
    base = load_config(study.base)
    from megahybrid.study.cells import RUNS
    from megahybrid.study.report import report

    for path in report(RUNS.parent / study.study, Path(parsed.file), base):
        print(path)
