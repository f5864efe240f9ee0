"""Submitting training jobs: what cannot work is refused here, and what is submitted stays as it was."""

from __future__ import annotations

import dataclasses
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megahybrid import code_version
from megahybrid.config import Config, load_config, save_config
from megahybrid.errors import UserError
from megahybrid.files import read_json, write_json, write_text
from megahybrid.launch import pinned, slurm
from megahybrid.launch.checks import check_start
from megahybrid.launch.profile import Profile
from megahybrid.launch.script import Job, followed_by, following, render, render_following
from megahybrid.training.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be submitted, and how.

    Attributes:
        configs: the runs, several as a job array.
        profile: the cluster.
        recipe, overrides: where they come from, which is noted.
        nodes: how many.
        chain: jobs that follow each other; 1 for one that requeues itself, or not.
        requeue: whether a job that has more to do puts itself back into the queue.
        folder: where the code and the job's output go; when left out the run directory, of an array the one above.
        after: the job, of an array ARRAY_ELEMENT, that has to succeed before; it may write what train.branch_from
            reads.
        then: steps that follow in a job of their own once the run is done (then.py).
    """

    configs: Sequence[Config]
    profile: Profile
    recipe: str
    overrides: Sequence[str] = ()
    nodes: int = 1
    chain: int = 1
    requeue: bool = True
    folder: Path | None = None
    after: str | None = None
    then: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Submission:
    """What was submitted: the scripts' texts by their files' names, where the first one's output goes, the jobs'
    numbers, and of what follows its number and where its output goes."""

    scripts: Mapping[str, str]
    output: Path
    numbers: Sequence[str] = ()
    then: str | None = None
    then_output: Path | None = None


def submit(request: Request, dry_run: bool = False) -> Submission:
    """Submit it, or with `dry_run` only check it. Raises UserError."""
    configs = request.configs
    if request.chain > 1 and len(configs) > 1:
        raise UserError("--chain and --array do not go together; the runs of an array requeue themselves.")
    for config in configs:
        check_start(config, request.nodes, request.profile.gpus_per_node)
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    run_dirs = [Path(config.run.dir).resolve() for config in configs]
    base = (request.folder or (run_dirs[0] if len(run_dirs) == 1 else run_dirs[0].parent)).resolve()
    name = re.sub(r"[^\w.=+-]", "_", base.name)
    job = Job(
        name=name,
        submission=f"{name}-{stamp}",
        configs=[path / "submit" / stamp / "config.yaml" for path in run_dirs],
        run_dirs=run_dirs,
        code=base / "submit" / stamp / "code",
        nodes=request.nodes,
        requeue=request.requeue and request.chain == 1,
        output=base / "logs" / ("slurm_%j.out" if len(run_dirs) == 1 else "slurm_%A_%a.out"),
    )
    scripts = {"job.sbatch": render(job, request.profile)}
    if request.then:
        scripts["then.sbatch"] = render_following(job, request.profile, request.then)
    if dry_run:
        return Submission(scripts, job.output)
    _refuse_a_second_job(run_dirs, bool(request.then))
    for script in scripts.values():
        slurm.sbatch_accepts(script)
    numbers, then = _send(job, configs, scripts, request)
    return Submission(scripts, job.output, numbers, then, following(job).output)


def array(recipe: str, overrides: Sequence[str], text: str) -> list[Config]:
    """The recipe with each value of "key=value,value,…", in run.dir/NAME=VALUE, NAME the key's last part. Raises
    UserError."""
    key, _, values = text.partition("=")
    if not values or "" in values.split(","):
        raise UserError(f"--array is '{text}'; give it as key=value,value,…")
    configs = []
    for value in values.split(","):
        config = load_config(recipe, [*overrides, f"{key}={value}"])
        config.run.dir = f"{config.run.dir.rstrip('/')}/{key.rsplit('.', 1)[-1]}={value}"
        configs.append(config)
    return configs


def _refuse_a_second_job(run_dirs: Sequence[Path], followed: bool) -> None:
    """Raise UserError where a job trains one of the runs, or where it is to be `followed` and a job follows it."""
    active = [job for job in slurm.jobs() if job.state in ("PENDING", "RUNNING", "COMPLETING")]
    for path in run_dirs:
        for facts in filter(None, map(read_json, path.glob("submit/*/job.json"))):
            of_what_follows = facts | {"submission": followed_by(facts["submission"])}
            for does, run in (("trains", facts), ("follows", of_what_follows))[: 1 + followed]:
                if job := next((job for job in active if job.is_for(run)), None):
                    raise UserError(
                        f"Job {job.id} {does} {path} already ({job.state.lower()}); cancel it first (scancel {job.id}),"
                        " or give another run.dir."
                    )


def _send(
    job: Job, configs: Sequence[Config], scripts: Mapping[str, str], request: Request
) -> tuple[list[str], str | None]:
    """Write what the jobs read and who they are, then submit them; all is taken back where one is refused."""
    folders = [path.parent for path in job.configs]
    numbers: list[str] = []
    try:
        _write(job, folders, configs, scripts)
        _record(job, folders, numbers, request)
        for _ in range(request.chain):
            numbers.append(slurm.sbatch(folders[0] / "job.sbatch", *_dependency(request, numbers)))
            _record(job, folders, numbers, request)
        # Whatever the others come to: of a chain the last ones are cancelled when the run is done. It looks by itself.
        after = f"--dependency=afterany:{':'.join(numbers)}"
        then = slurm.sbatch(folders[0] / "then.sbatch", after) if request.then else None
    except BaseException:
        _take_back([job.code.parent, *folders], numbers)
        raise
    return numbers, then


def _dependency(request: Request, numbers: Sequence[str]) -> list[str]:
    """Options of sbatch: after the chain's job before, or after what the request waits for."""
    if numbers:
        return [f"--dependency=afterany:{numbers[-1]}"]
    return [f"--dependency=afterok:{request.after}", "--kill-on-invalid-dep=yes"] if request.after else []


def _write(job: Job, folders: Sequence[Path], configs: Sequence[Config], scripts: Mapping[str, str]) -> None:
    job.output.parent.mkdir(parents=True, exist_ok=True)
    pinned.pin(job.code)
    for folder, config, run_dir in zip(folders, configs, job.run_dirs, strict=True):
        save_config(_elsewhere(config, run_dir), folder / "config.yaml")
        for name, script in scripts.items():
            write_text(folder / name, script)
        RunDirectory(run_dir).logs.mkdir(exist_ok=True)


def _elsewhere(config: Config, run_dir: Path) -> Config:
    """The configuration with absolute paths: it is read from another folder."""
    sources = {
        name: dataclasses.replace(
            source,
            parameters=_absolute(source.parameters, "haystack"),
            stages=[_absolute(stage, "haystack") for stage in source.stages],
        )
        for name, source in config.data.sources.items()
    }
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(run_dir)),
        train=dataclasses.replace(config.train, **_absolute(vars(config.train), "init_from", "branch_from")),
        data=dataclasses.replace(
            config.data, **{**_absolute(vars(config.data), "path", "tokenizer"), "sources": sources}
        ),
    )


def _absolute(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {
        name: str(Path(value).expanduser().resolve()) if name in names and value is not None else value
        for name, value in values.items()
    }


def _record(job: Job, folders: Sequence[Path], numbers: Sequence[str], request: Request) -> None:
    facts = {"submission": job.submission, "jobs": numbers, "code_version": code_version(), "recipe": request.recipe}
    for number, folder in enumerate(folders):
        element = {"element": number} if len(folders) > 1 else {}
        write_json(folder / "job.json", {**facts, **element, "overrides": list(request.overrides)})


def job_of(run_dir: Path) -> str | None:
    """The job that was submitted last for a run, of an array ARRAY_ELEMENT; None where none was."""
    for path in sorted(run_dir.glob("submit/*/job.json"), reverse=True):
        facts = read_json(path)
        if facts and facts["jobs"]:
            return facts["jobs"][-1] + (f"_{facts['element']}" if "element" in facts else "")
    return None


def _take_back(folders: Sequence[Path], numbers: Sequence[str]) -> None:
    """Cancel the jobs, the last of a chain first so that none begins, and remove what was written for them.

    Raises UserError, which names those that stay in the queue, where Slurm does not take them back.
    """
    left = []
    for number in reversed(numbers):
        try:
            slurm.cancel(number)
        except UserError:
            left.append(number)
    if left:
        raise UserError(f"The chain could not be submitted whole, nor taken back: run scancel {' '.join(left)}.")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def show(submission: Submission) -> str:
    """The scripts; each one's text below its name, where there are several."""
    if len(submission.scripts) == 1:
        return submission.scripts["job.sbatch"]
    return "\n".join(f"# --- {name} ---\n{text}" for name, text in submission.scripts.items())


def describe(submission: Submission) -> str:
    """What is printed after submitting: the jobs and where their output is."""
    logs = submission.output.parent
    lines = [
        f"Submitted job {', then '.join(submission.numbers)}.",
        f"Its output:   {_named(submission.output, submission.numbers[0])}",
        f"Every rank's: {logs}/rank_00000.out and so on",
        f"Follow it:    megahybrid runs {logs.parent}",
    ]
    if submission.then is not None:
        lines.append(f"What follows: job {submission.then}, {_named(submission.then_output, submission.then)}")
    return "\n".join(lines)


def _named(output: Path, number: str) -> Path:
    return output.with_name(output.name.replace("%j", number).replace("%A", number).replace("%a", "0"))
