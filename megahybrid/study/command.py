"""`megahybrid study VERB FILE`: the verbs and their flags."""

from __future__ import annotations

import argparse


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """A parser for each verb, whose default `run` does it."""
    verbs = verb.add_subparsers(required=True, metavar="VERB")
    text = "every run with its cost, and how well the study will predict; starts nothing"
    plan = verbs.add_parser("plan", help=text, description=text)
    plan.add_argument("file", metavar="FILE", help="a YAML file, such as recipes/studies/small.yaml")
    plan.set_defaults(run=_plan)


def _plan(parsed: argparse.Namespace) -> None:
    from megahybrid.study.file import load_study

    study = load_study(parsed.file)
    from megahybrid.study.plan import plan

    print(plan(study, parsed.file))
