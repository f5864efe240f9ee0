"""`megahybrid eval`: its flags, and what it prints."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from megahybrid.errors import UserError
from megahybrid.inference.command import add_dtype

if TYPE_CHECKING:
    from megahybrid.config import Config
    from megahybrid.evaluation.runner import Plan


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """The flags."""
    more = {"nargs": "+", "action": "extend"}
    verb.add_argument("path", type=Path, metavar="PATH", help="a run directory, a checkpoint, or an exported model")
    verb.add_argument("--task", **more, default=[], metavar="NAME", help="default: those of the recipe's data.sources")
    verb.add_argument("--set", **more, default=[], metavar="KEY=VALUE", help="changes to the tasks' parameters")
    verb.add_argument(
        "--lengths", default="", metavar="N,N,…", help="tokens, such as 1k,4k,1m (default: 1, 4, 16 times training's)"
    )
    verb.add_argument("--depths", type=int, default=10, help="places of a single needle (default 10)")
    verb.add_argument("--samples", type=int, default=100, help="of each length and depth (default 100)")
    verb.add_argument(
        "--mode",
        choices=("forced", "generate"),
        default="forced",
        help="forced: one pass over the sample with its answers; generate: the model writes them (default forced)",
    )
    verb.add_argument(
        "--policy",
        **more,
        default=[],
        metavar="NAME",
        help="what tokens are kept by (default learned)",
    )
    add_dtype(verb)
    verb.add_argument("--batch-size", type=int, help="samples in work at once (default 16, fewer where they are long)")
    verb.add_argument("--prefill-chunk", type=int, help="tokens read in one step (default 65536 on a GPU, else 2048)")
    verb.add_argument("--out", type=Path, metavar="DIR", help="default: evaluations/step_N beside the model")


def run(parsed: argparse.Namespace) -> None:
    """Evaluate and print a table; on rank 0 only, all ranks compute. Raises UserError."""
    from megahybrid.evaluation import runner, subject

    plan = planned(parsed, subject.recipe(parsed.path))
    runner.evaluate(subject.load(parsed.path, parsed.dtype), plan, parsed.out)


def check(parsed: argparse.Namespace, config: Config) -> None:
    """Raise UserError for what `run` would refuse to ask of the model that this recipe trains, as far as is known
    before. Of data.remote nothing is read, and no sample is tried with its tokenizer."""
    plan = planned(parsed, config)
    if config.data.remote is None:
        from megahybrid.data.opened import open_data
        from megahybrid.evaluation import subject

        plan.check(subject.vocabulary(config, open_data(config).tokenizer))


def planned(parsed: argparse.Namespace, config: Config) -> Plan:
    """What the flags ask of a model with this configuration. Raises UserError for what cannot be asked of it."""
    lengths = _lengths(parsed.lengths)
    for name in ("depths", "samples", "batch_size", "prefill_chunk"):
        if (value := getattr(parsed, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    from megahybrid.evaluation import modes, runner, tasks

    plan = runner.Plan(
        tasks.choose(config, parsed.task, parsed.set),
        lengths or tuple(config.train.seq_length * factor for factor in (1, 4, 16)),
        *(parsed.depths, parsed.samples, parsed.mode, tuple(dict.fromkeys(parsed.policy)) or ("learned",)),
        *(parsed.batch_size, parsed.prefill_chunk),
    )
    modes.check(config, plan.policies)
    return plan


def _lengths(text: str) -> tuple[int, ...]:
    """The numbers of 1k,4k,1m, ascending: 1k is 1024."""
    lengths = set()
    for each in filter(None, text.split(",")):
        found = re.fullmatch(r"(\d+)([km]?)", each.strip().lower())
        if found is None or int(found[1]) == 0:
            raise UserError(f"--lengths has '{each}'; write numbers of tokens such as 512, 4k (4096) or 1m.")
        lengths.add(int(found[1]) * {"": 1, "k": 2**10, "m": 2**20}[found[2]])
    return tuple(sorted(lengths))
