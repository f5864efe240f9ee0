"""`megahybrid study VERB FILE`: the verbs and their flags."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megahybrid.errors import UserError


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """A parser for each verb, whose default `run` does it."""
    verbs = verb.add_subparsers(required=True, metavar="VERB")
    text = "every run with its cost, and how well the study will predict; starts nothing"
    plan = verbs.add_parser("plan", help=text, description=text)
    plan.add_argument("file", metavar="FILE", help="a YAML file, such as recipes/studies/small.yaml")
    plan.set_defaults(run=_plan)
    text = "begin what is missing, here or through Slurm; the same command goes on"
    launch = verbs.add_parser("launch", help=text, description=text)
    launch.add_argument("file", metavar="FILE", help="the study's YAML file")
    launch.add_argument("--jobs", type=int, metavar="N", help="here, N runs side by side, whatever limits.profile says")
    launch.add_argument("--wait", action="store_true", help="through Slurm, too, go on until all is done")
    launch.set_defaults(run=_launch)
    for name, run, text in (
        ("status", _status, "how far every run is, and all of them together"),
        ("collect", _collect, "what the runs came to, in runs.csv"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("file", metavar="FILE", help="the study's YAML file")
        verb.set_defaults(run=run)


def _plan(parsed: argparse.Namespace) -> None:
    from megahybrid.study.file import load_study

    study = load_study(parsed.file)
    from megahybrid.study.describe import describe
    from megahybrid.study.plan import check_limits, make_plan, save

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
