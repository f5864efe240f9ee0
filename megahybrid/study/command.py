"""`megahybrid study VERB FILE`: the verbs and their flags."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """A parser for each verb, whose default `run` does it."""
    verbs = verb.add_subparsers(required=True, metavar="VERB")
    text = "every run with its cost, and how well the study will predict; starts nothing"
    plan = verbs.add_parser("plan", help=text, description=text)
    plan.add_argument("file", metavar="FILE", help="a YAML file, such as recipes/studies/small.yaml")
    plan.add_argument(
        "--probe", action="store_true", help="GPU hours from some steps of every model on this machine's GPU"
    )
    plan.set_defaults(run=_plan)


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
