"""`megahybrid study VERB FILE`: the verbs and their flags."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megahybrid.errors import UserError
from megahybrid.files import write_json


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """A parser for each verb, whose default `run` does it."""
    verbs = verb.add_subparsers(required=True, metavar="VERB")
    text = "every run with its cost, and how well the study will predict; starts nothing"
    plan = verbs.add_parser("plan", help=text, description=text)
    plan.add_argument("file", metavar="FILE", help="a YAML file, such as recipes/studies/tiny.yaml")
    plan.add_argument(
        "--probe", action="store_true", help="GPU hours from some steps of every model on this machine's GPU"
    )
    plan.set_defaults(run=_plan)
    text = "begin what is missing, here or through Slurm; the same command goes on"
    launch = verbs.add_parser("launch", help=text, description=text)
    launch.add_argument("file", metavar="FILE", help="the study's YAML file")
    launch.add_argument(
        "--jobs", type=int, metavar="RUNS", help="here, so many at once over its GPUs, whatever limits.profile says"
    )
    launch.add_argument("--wait", action="store_true", help="through Slurm, too, go on until all is done")
    launch.set_defaults(run=_launch)
    for name, run, text in (
        ("status", _status, "how far every run is, and all of them together"),
        ("collect", _collect, "what the runs came to, in runs.csv"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("file", metavar="FILE", help="the study's YAML file")
        verb.set_defaults(run=run)
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
    fit.add_argument(
        "--drop-largest-losses", type=int, default=0, metavar="RUNS", help="how many to leave out (default 0)"
    )
    fit.add_argument("--bootstrap", type=int, default=1000, metavar="REPLICATES", help="for intervals (default 1000)")
    fit.set_defaults(run=_fit)


def _plan(parsed: argparse.Namespace) -> None:
    from megahybrid.study.file import load_study

    study = load_study(parsed.file)
    from megahybrid.study.describe import describe
    from megahybrid.study.plan import check_limits, make_plan, save

    if parsed.probe:
        from megahybrid.training.measuring import probe

        plan = make_plan(study, probe)
    else:
        plan = make_plan(study)
    print(describe(plan))
    check_limits(plan)
    print(f"\n{save(plan, Path(parsed.file))}")


def _launch(parsed: argparse.Namespace) -> int:
    from megahybrid.study.file import load_study

    if parsed.jobs is not None and parsed.jobs < 1:
        raise UserError("--jobs must be at least 1.")
    study = load_study(parsed.file)
    from megahybrid.study.launch import launch

    return launch(study, parsed.file, parsed.jobs, parsed.wait, say=lambda text: print(text, flush=True))


def _status(parsed: argparse.Namespace) -> None:
    from megahybrid.study.file import load_study

    study = load_study(parsed.file)
    from megahybrid.study.status import show

    show(study, say=lambda text: print(f"megahybrid: {text}", file=sys.stderr))


def _collect(parsed: argparse.Namespace) -> None:
    from megahybrid.study.file import load_study

    study = load_study(parsed.file)
    from megahybrid.study.collect import collect

    print(collect(study, say=lambda text: print(text, flush=True)))


def _fit(parsed: argparse.Namespace) -> None:
    if not (parsed.bootstrap == 0 or parsed.bootstrap >= 100):
        raise UserError(f"--bootstrap is {parsed.bootstrap}; give 0 for no intervals, or at least 100.")
    if parsed.file and (parsed.columns or parsed.drop_largest_losses or not parsed.bootstrap):
        raise UserError("--columns, --drop-largest-losses and --bootstrap 0 go with --runs, not with a study.")
    from megahybrid.study import fit, fit_text, table

    if parsed.file:
        from megahybrid.study.file import load_study

        study = load_study(parsed.file)
        found, path = fit.fit(study, parsed.bootstrap), study.folder / "fit.json"
    else:
        columns = table.parse_columns(parsed.columns) if parsed.columns else None
        runs = table.read_runs(parsed.runs, columns, parsed.drop_largest_losses, table.FIT_COLUMNS)
        found, path = fit.fit_runs(runs, (), parsed.bootstrap), parsed.runs.with_suffix(".fit.json")
        write_json(path, found)
    print(fit_text.describe(found))
    print(f"\n{path}")


def _report(parsed: argparse.Namespace) -> None:
    from megahybrid.config import load_config
    from megahybrid.study.file import load_study

    study = load_study(parsed.file)
    base = load_config(study.base)
    from megahybrid.study.report import report

    for path in report(study.folder, Path(parsed.file), base):
        print(path)
