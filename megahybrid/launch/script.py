"""The job scripts: templates in slurm/ with a cluster's directives and a job's settings filled in."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megahybrid.errors import UserError
from megahybrid.launch.profile import FOLDER, Profile

_SETTINGS, _END = "# settings:", "# end of settings"


@dataclass(frozen=True)
class Job:
    """What is submitted.

    Attributes:
        name: of the job.
        submission: by which its starts are told from others of the same run; the job's comment.
        configs, run_dirs: of each run, more than one in a job array.
        code: where the copy of the code is that the job runs.
        nodes: how many.
        requeue: whether it puts itself back into the queue; else the next job of a chain goes on.
        output: where the script's own output goes, with Slurm's %j, or %A and %a, in the file's name.
    """

    name: str
    submission: str
    configs: Sequence[Path]
    run_dirs: Sequence[Path]
    code: Path
    nodes: int
    requeue: bool
    output: Path


def render(job: Job, profile: Profile) -> str:
    """The training script's text. Raises UserError, naming the key, for what no script could say."""
    _check_paths(job)
    return _filled("train.sbatch", _directives(job, profile), _settings(job, profile))


def followed_by(submission: str) -> str:
    """The submission of what follows that one."""
    return f"{submission}-then"


def following(job: Job) -> Job:
    """The job of one process that goes through the steps once that job has ended."""
    output = job.output.with_name(f"then_{job.output.name.removeprefix('slurm_')}")
    return replace(job, name=f"{job.name}-then", submission=followed_by(job.submission), nodes=1, output=output)


def render_following(job: Job, profile: Profile, steps: Sequence[str]) -> str:
    """Likewise the script of `following`, with these steps (then.py)."""
    job, profile = following(job), _of_one_gpu(profile)
    return _filled("then.sbatch", _directives(job, profile), [*_settings(job, profile), _array("THEN", steps)])


def _of_one_gpu(profile: Profile) -> Profile:
    """With a GPU's share of a node, and without what asks for all of it."""
    whole = ("--exclusive", "--mem")
    return replace(
        profile,
        gpus_per_node=1,
        mem=_share(profile.mem, profile.gpus_per_node),
        sbatch=[option for option in profile.sbatch if option.partition("=")[0] not in whole],
    )


def _share(memory: str | None, parts: int) -> str | None:
    """Of memory as sbatch reads it, a bare number in megabytes; None, for the cluster's default, of all of a node's."""
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", memory or "0", re.IGNORECASE)
    if found is None:
        return memory  # sbatch will say so
    megabytes = int(found[1]) * 1024.0 ** ("KMGT".index(found[2].upper() or "M") - 1) / parts
    return f"{math.ceil(megabytes)}M" if megabytes else None


def _filled(template: str, directives: Sequence[str], settings: Sequence[str]) -> str:
    template = (FOLDER / template).read_text(encoding="utf-8")
    shebang, rest = template.split("\n", 1)
    comments = rest[rest.index("#\n") : rest.index(_SETTINGS)]
    body = rest[rest.index(_END) :]
    return "\n".join([shebang, *directives, comments + "\n".join(settings), body])


def _check_paths(job: Job) -> None:
    for path in map(str, job.run_dirs):
        if "\\" in path or not path.isprintable():
            raise UserError(
                f"run.dir {path!r} cannot be that of a Slurm job, which takes no backslashes and control characters in "
                "file names; choose another."
            )
    if ":" in str(job.code):
        raise UserError(
            f"run.dir {str(job.run_dirs[0])!r} cannot be that of a Slurm job, whose PYTHONPATH leads there and ends a "
            "folder at each ':'; choose another."
        )


def _directive(key: str, option: str) -> str:
    """The line of one option, quoted as sbatch reads it: else it takes a # for a comment, and a space for an end."""
    if not option.isprintable():
        raise UserError(f"{key} has {option!r}, which does not fit into a line of a job script; write it on one line.")
    if re.search(r"[\s#\"'\\]", option):
        option = '"' + re.sub(r'(["\\])', r"\\\1", option) + '"'
    return f"#SBATCH {option}"


def _directives(job: Job, profile: Profile) -> list[str]:
    gpus = profile.gpus_per_node
    options = {
        "job-name": job.name,
        "comment": job.submission,
        "nodes": job.nodes,
        "ntasks-per-node": gpus,
        "gpus-per-node": f"{profile.gpu_type}:{gpus}" if profile.gpu_type else gpus,
        "cpus-per-task": profile.cpus_per_gpu,
        "mem": profile.mem,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "time": profile.time,
        "signal": f"B:USR1@{profile.signal_seconds}",
        "open-mode": "append",
        "output": f"{str(job.output.parent).replace('%', '%%')}/{job.output.name}",
    }
    keys = {"gpus-per-node": "gpu_type"}
    lines = [
        _directive(f"The profile's {keys.get(name, name)}", f"--{name}={value}")
        for name, value in options.items()
        if value is not None
    ]
    if len(job.configs) > 1:
        lines.append(f"#SBATCH --array=0-{len(job.configs) - 1}")
    lines.append(f"#SBATCH --{'' if job.requeue else 'no-'}requeue")
    return [*lines, *(_directive("The profile's sbatch", _option(option)) for option in profile.sbatch)]


def _option(text: str) -> str:
    """An option of sbatch. Raises UserError for what would be read as several, or as none."""
    if not re.match(r"--[A-Za-z][\w-]*(=|$)", text):
        raise UserError(
            f"The profile's sbatch has {text!r}; write one option an entry, by its long name, with = before its "
            "value, such as --exclusive or --constraint=h100."
        )
    return text


def _array(name: str, values: Sequence[object]) -> str:
    return f"{name}=({' '.join(shlex.quote(str(value)) for value in values)})"


def _settings(job: Job, profile: Profile) -> list[str]:
    for name in profile.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UserError(f"The profile's environment has {name!r}, which cannot name a variable; correct it.")
    # A Python of the cluster's own, in a container say, has its own packages, and no use for those of this one.
    packages = "" if profile.python else os.environ.get("PYTHONPATH", "")
    return [
        "# settings: one entry a run of a job array",
        _array("CONFIGS", job.configs),
        _array("RUN_DIRS", job.run_dirs),
        f"CODE={shlex.quote(str(job.code))}",
        _array("PYTHON", profile.python or [sys.executable]),
        _array("SRUN_OPTIONS", profile.srun),
        f"ON_STOP={'requeue' if job.requeue else 'exit'}",
        f"export MEGAHYBRID_SUBMISSION={shlex.quote(job.submission)}",
        f"export PYTHONPATH={shlex.quote(packages)}",
        *(f"export {name}={shlex.quote(str(value))}" for name, value in profile.environment.items()),
        *profile.setup,
    ]
