"""The command line: one verb a thing to do. It parses, calls, and turns UserError into one line and exit code 2, or 75
where a machine was at fault: starting again may do it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megahybrid import code_version
from megahybrid.errors import MachineFault, UserError
from megahybrid.evaluation.command import add_arguments as add_eval_arguments
from megahybrid.evaluation.command import check as check_evaluation
from megahybrid.evaluation.command import run as evaluate
from megahybrid.evaluation.loss import add_arguments as add_loss_arguments
from megahybrid.evaluation.loss import run as loss
from megahybrid.inference.command import add_arguments as add_generate_arguments
from megahybrid.inference.command import run as generate
from megahybrid.launch.task import GO_ON
from megahybrid.study.command import add_arguments as add_study_arguments

if TYPE_CHECKING:
    from megahybrid.config import Config
    from megahybrid.launch.profile import Profile


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parsed = _parse(arguments)
    quieten_libraries()
    try:
        with contextlib.nullcontext() if parsed.run is _train else _terminated_as_interrupted():
            code = parsed.run(parsed) or 0
            sys.stdout.flush()
            return code
    except UserError as error:
        _say(error)
        return GO_ON if isinstance(error, MachineFault) else 2
    except BrokenPipeError:
        if not _unheard():
            raise
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        where = " from the last checkpoint, if there is one" if parsed.run is _train else ""
        print(f"megahybrid: interrupted; the same command goes on{where}.", file=sys.stderr)
        return 130
    finally:
        _leave_groups()


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, too, lets what was begun be tidied up; training does so by itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes `key=value` before options only; users put them anywhere."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if any(each.startswith("-") or not hasattr(parsed, "overrides") for each in rest):
        keys = [each.lstrip("-") for each in rest if each.startswith("--") and "=" in each]
        a_recipe = keys and hasattr(parsed, "overrides")
        hint = f"; changes to the recipe have no dashes: {' '.join(keys)}" if a_recipe else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)} (see megahybrid {parsed.verb} --help){hint}")
    if rest:
        parsed.overrides += rest
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megahybrid", description="Pretrain hybrid linear + sparse attention models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version, and of a checkout the commit")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    recipes = {
        "prepare": (_prepare, "text → tokenizer → shards"),
        "train": (_train, "train, or go on from the newest checkpoint"),
        "plan": (_plan, "parameters, FLOPs a token, tokens, GPU hours and memory a GPU; starts nothing"),
    }
    for name, (run, text) in recipes.items():
        verb = _verb(verbs, name, text)
        verb.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as recipes/quickstart.yaml")
        verb.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
        verb.set_defaults(run=run)
    verb = verbs.choices["plan"]
    speed = verb.add_mutually_exclusive_group()
    speed.add_argument("--like", type=Path, metavar="RUN", help="GPU hours at the MFU of this run, not a table's")
    speed.add_argument("--probe", action="store_true", help="GPU hours from some steps on this machine's GPU")
    verb.add_argument(
        "--gpus", type=int, metavar="COUNT", help="also which layout to have on so many H100s, by estimates"
    )
    verb = _verb(verbs, "generate", "text from a checkpoint or an exported model, split over all processes")
    add_generate_arguments(verb)
    verb.set_defaults(run=_generate)
    text = "what a model recalls: tasks by length and depth, with intervals and pictures"
    verb = _verb(verbs, "eval", text)
    add_eval_arguments(verb)
    verb.set_defaults(run=evaluate)
    verb = _verb(verbs, "loss", "how well a model predicts texts: nats a token, perplexity, bits a byte")
    add_loss_arguments(verb)
    verb.set_defaults(run=loss)
    text = "other people's benchmarks, by lm-evaluation-harness, on a run, a checkpoint or an exported model"
    verb = _verb(verbs, "harness", text)
    verb.add_argument("path", type=Path, metavar="PATH", help="a run directory, a checkpoint, or an exported model")
    verb.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="as `lm_eval run` takes them")
    verb.set_defaults(run=_harness)
    _add_conversions(verbs)
    _add_submit(verbs)
    text = "scaling studies: kinds of models over sizes and budgets, from plan to report"
    add_study_arguments(_verb(verbs, "study", text))
    verb = _verb(verbs, "runs", "the runs under a folder: state, speed, loss, time left, jobs")
    verb.add_argument("path", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="default: runs")
    verb.set_defaults(run=_runs)
    text = (
        "check this machine's software, GPUs, kernels, links and disk, and a recipe's data; 1 where something is wrong"
    )
    verb = _verb(verbs, "doctor", text)
    verb.add_argument("recipe", metavar="RECIPE", nargs="?", help="a YAML file whose run.dir and data to check")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    verb.set_defaults(run=_doctor)
    verb = _verb(verbs, "keys", "every key of a recipe: its type, value, range and meaning")
    verb.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="only keys with one of these in their names; key=value changes the recipe",
    )
    verb.add_argument("--recipe", metavar="RECIPE", help="its values, not the schema's defaults")
    verb.set_defaults(run=_keys)
    verb = _verb(verbs, "plot", "pictures and a summary from a run's metrics.jsonl")
    verb.add_argument("path", type=Path, metavar="RUN", help="a run directory")
    verb.set_defaults(run=_plot)
    return parser


class _Version(argparse.Action):
    """As argparse's own, but a checkout's commit is asked for only where it is said."""

    def __call__(self, parser: argparse.ArgumentParser, *_) -> None:
        print(f"megahybrid {code_version()}")
        parser.exit()


def _verb(verbs: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=text, description=text)


def _add_conversions(verbs: argparse._SubParsersAction) -> None:
    """The verbs of the Hugging Face format."""
    verb = _verb(verbs, "export", "a checkpoint as a folder that transformers loads")
    verb.add_argument("path", type=Path, metavar="CHECKPOINT", help="a run directory or a checkpoint in it")
    verb.add_argument("target", type=Path, metavar="DIR", help="the new folder")
    verb.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights (default bf16)")
    verb.add_argument("--shard-size", default="5GB", help="the most a file holds (default 5GB)")
    verb.add_argument("--license", help="of the weights, as the hub writes it, such as apache-2.0")
    text = "the folder must have all that the hub wants of this repository, a --license too"
    verb.add_argument("--push-ready", metavar="USER/NAME", help=text)
    verb.set_defaults(run=_export)
    imports = _verb(verbs, "import", "a Hugging Face folder as a checkpoint, for train.init_from")
    imports.add_argument("source", type=Path, metavar="HF_DIR", help="what `export` wrote, or a published model")
    imports.add_argument("target", type=Path, metavar="CHECKPOINT", help="the new checkpoint's folder")
    imports.set_defaults(run=_import)
    for each in (verb, imports):
        each.add_argument(
            "--verify",
            action=argparse.BooleanOptionalAction,
            help="compare logits of both forms; a difference fails the conversion (default: where memory suffices)",
        )


def _add_submit(verbs) -> None:
    verb = _verb(verbs, "submit", "a Slurm job that trains, requeues itself, and goes on")
    verb.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as recipes/lalte-0.4b.yaml")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    verb.add_argument("--profile", default="generic", help="a file, or a name in slurm/profiles (default generic)")
    verb.add_argument("--nodes", type=int, default=1, help="default 1")
    verb.add_argument("--gpus-per-node", type=int, help="default: the profile's")
    verb.add_argument("--time", help="time limit of a job, as sbatch takes it (default: the profile's)")
    verb.add_argument("--chain", type=int, default=1, metavar="JOBS", help="each goes on where one before ended")
    verb.add_argument(
        "--array", metavar="KEY=V,V,…", help="a run for each value of a key, in run.dir/NAME=V by its last part"
    )
    verb.add_argument(
        "--requeue",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put the job back into the queue when there is more to do (default)",
    )
    verb.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="STEP,…",
        help='once the run is done, in a job of one GPU: eval, harness, export; one with flags as "eval --lengths 1k"',
    )
    verb.add_argument("--dry-run", action="store_true", help="print the script, and that of --then; submit nothing")
    verb.set_defaults(run=_submit)


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
    if parsed.gpus is not None and parsed.gpus < 1:
        raise UserError("--gpus must be at least 1.")
    config = _config(parsed)
    from megahybrid.scaling.plan import describe, recommend
    from megahybrid.training.measuring import measured, probe

    estimate = measured(config, parsed.like) if parsed.like else probe(config) if parsed.probe else None
    print(describe(config, estimate))
    if parsed.gpus:
        print(f"\n{recommend(config, parsed.gpus)}")


def _generate(parsed: argparse.Namespace) -> None:
    from megahybrid.training import checkpoint_folder

    if checkpoint_folder.find(parsed.path) is not None or not (parsed.path / "config.json").is_file():
        return generate(parsed)
    from megahybrid.hf.import_ import as_checkpoint

    generate(parsed, as_checkpoint)


def _keys(parsed: argparse.Namespace) -> None:
    from megahybrid.config import load_config
    from megahybrid.config.listing import listing

    overrides = [word for word in parsed.words if "=" in word]
    if overrides and not parsed.recipe:
        raise UserError(f"{overrides[0]} changes a recipe; name it with --recipe.")
    config = load_config(parsed.recipe, overrides) if parsed.recipe else None
    print(listing([word for word in parsed.words if word not in overrides], config))


def _harness(parsed: argparse.Namespace) -> None:
    from megahybrid.evaluation.harness import run

    run(parsed.path, parsed.arguments)


def _export(parsed: argparse.Namespace) -> None:
    from megahybrid.hf.export import export

    export(
        *(parsed.path, parsed.target, parsed.dtype, parsed.shard_size, parsed.verify),
        license_=parsed.license,
        repository=parsed.push_ready,
    )


def _import(parsed: argparse.Namespace) -> None:
    from megahybrid.hf.import_ import import_model

    import_model(parsed.source, parsed.target, parsed.verify)


def _submit(parsed: argparse.Namespace) -> None:
    from dataclasses import replace

    from megahybrid.launch.profile import load_profile
    from megahybrid.launch.submit import Request, array, describe, show, submit

    if parsed.nodes < 1 or parsed.chain < 1 or (parsed.gpus_per_node or 1) < 1:
        raise UserError("--nodes, --gpus-per-node and --chain must be at least 1.")
    profile = load_profile(parsed.profile)
    changes = {"gpus_per_node": parsed.gpus_per_node, "time": parsed.time}
    profile = replace(profile, **{name: value for name, value in changes.items() if value is not None})
    configs = [_config(parsed)] if parsed.array is None else array(parsed.recipe, parsed.overrides, parsed.array)
    then = _steps(parsed.then, configs, profile)
    request = Request(
        configs, profile, parsed.recipe, parsed.overrides, parsed.nodes, parsed.chain, parsed.requeue, then=then
    )
    submission = submit(request, parsed.dry_run)
    print(show(submission) if parsed.dry_run else describe(submission))


def _steps(texts: Sequence[str], configs: Sequence[Config], profile: Profile) -> list[str]:
    """The steps of --then, each of which the run's configuration and the job's packages allow. Raises UserError."""
    from megahybrid.hf.hub import check_wishes
    from megahybrid.launch.then import STEPS

    steps = [step for text in texts for step in ([text] if " " in text.strip() else text.split(","))]
    for step in steps:
        verb, *arguments = shlex.split(step) or [""]
        if verb not in STEPS:
            raise UserError(f"--then has '{step}'; give {', '.join(STEPS)}, with flags of theirs if there are any.")
        places = ["RUN", "TARGET"] if verb == "export" else ["RUN"]
        parsed = _parse([verb, *places, *arguments])
        if verb == "export":
            check_wishes(parsed.push_ready, parsed.license)
        elif verb == "eval":
            for config in configs:
                check_evaluation(parsed, config)
        elif verb == "harness" and not profile.python:  # a Python of the cluster's own has packages of its own
            from megahybrid.evaluation import harness  # noqa: F401  # or it says what to install
    return steps


def _runs(parsed: argparse.Namespace) -> None:
    from megahybrid.launch.runs import find, show

    show(find(parsed.path, say=lambda text: print(f"megahybrid: {text}", file=sys.stderr)))


def _doctor(parsed: argparse.Namespace) -> int:
    config = _config(parsed) if parsed.recipe else None
    from megahybrid.doctor.diagnosis import diagnose

    return 1 if diagnose(config, say=lambda text: print(text, flush=True)) else 0


def _plot(parsed: argparse.Namespace) -> None:
    from megahybrid.training.plots import plot_run
    from megahybrid.training.report import summarise

    for picture in plot_run(parsed.path):
        print(picture)
    print(summarise(parsed.path))


def _unheard() -> bool:
    """Whether nobody reads standard output any more, as behind `| head`; then nothing is written there at the end."""
    out = select.poll()
    out.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in out.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _say(error: UserError) -> None:
    """Print the sentence once: before the processes have joined, all of them found the same fault."""
    rank = int(os.environ.get("RANK", "0"))
    groups = sys.modules.get("megahybrid.parallel.groups")
    if rank == 0:
        print(f"megahybrid: {error}", file=sys.stderr)
    elif groups is not None and groups.joined():
        print(f"megahybrid (rank {rank}): {error}", file=sys.stderr)


def quieten_libraries() -> None:
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
