"""The command line: one verb a thing to do. It parses, calls, and turns UserError into one line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megahybrid.errors import UserError
from megahybrid.inference.command import add_arguments as add_generate_arguments
from megahybrid.inference.command import run as generate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    _quieten_libraries()
    try:
        parsed.run(parsed)
    except UserError as error:
        _say(error)
        return 2
    except KeyboardInterrupt:
        print("megahybrid: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    finally:
        _leave_groups()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megahybrid", description="Pretrain hybrid linear + sparse attention models.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    recipes = {
        "prepare": (_prepare, "text → tokenizer → shards"),
        "train": (_train, "train, or go on from the newest checkpoint"),
        "plan": (_plan, "parameters, FLOPs a token, tokens and memory a GPU; starts nothing"),
    }
    for name, (run, text) in recipes.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as recipes/quickstart.yaml")
        verb.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
        verb.set_defaults(run=run)
    verb = verbs.add_parser("generate", help="text from a checkpoint, split over all processes")
    add_generate_arguments(verb)
    verb.set_defaults(run=generate)
    verb = verbs.add_parser("plot", help="pictures and a summary from a run's metrics.jsonl")
    verb.add_argument("path", type=Path, metavar="RUN", help="a run directory")
    verb.set_defaults(run=_plot)
    return parser


def _config(parsed: argparse.Namespace):
    """The recipe, read before the heavy imports: a wrong one is refused at once."""
    from megahybrid.config import load_config

    return load_config(parsed.recipe, parsed.overrides)


def _prepare(parsed: argparse.Namespace) -> None:
    config = _config(parsed)
    from megahybrid.data.prepare import prepare

    prepare(config)


def _train(parsed: argparse.Namespace) -> None:
    config = _config(parsed)
    from megahybrid.training.loop import train

    train(config, report=lambda text: print(text, flush=True))


def _plan(parsed: argparse.Namespace) -> None:
    config = _config(parsed)
    from megahybrid.scaling.plan import describe

    print(describe(config))


def _plot(parsed: argparse.Namespace) -> None:
    from megahybrid.training.plots import plot_run
    from megahybrid.training.report import summarise

    for picture in plot_run(parsed.path):
        print(picture)
    print(summarise(parsed.path))


def _say(error: UserError) -> None:
    """Print the sentence once: before the processes have joined, all of them found the same fault."""
    rank = int(os.environ.get("RANK", "0"))
    groups = sys.modules.get("megahybrid.parallel.groups")
    if rank == 0:
        print(f"megahybrid: {error}", file=sys.stderr)
    elif groups is not None and groups.joined():
        print(f"megahybrid (rank {rank}): {error}", file=sys.stderr)


def _quieten_libraries() -> None:
    """Keep the libraries' own banners off the terminal; warnings come back with MEGAHYBRID_DEBUG=1."""
    if not os.environ.get("MEGAHYBRID_DEBUG"):
        warnings.filterwarnings("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        os.environ.setdefault("WANDB_SILENT", "true")


def _leave_groups() -> None:
    """Leave the process groups, if any were joined."""
    if "megahybrid.parallel.groups" in sys.modules:
        with contextlib.suppress(Exception):
            sys.modules["megahybrid.parallel.groups"].shut_down()
