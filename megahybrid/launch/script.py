"""The job script: slurm/train.sbatch with a cluster's directives and a job's settings filled in."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megahybrid.launch.profile import FOLDER, Profile

_CLONE = FOLDER.parent
_SETTINGS, _END = "# settings:", "# end of settings"


@dataclass(frozen=True)
class Job:
    """What is submitted.

    Attributes:
        name: of the job.
        submission: by which its starts are told from others of the same run; the job's comment.
        configs, run_dirs: of each run, more than one in a job array.
        nodes: how many.
        requeue: whether it puts itself back into the queue; else the next job of a chain goes on.
        output: where the script's own output goes.
    """

    name: str
    submission: str
    configs: Sequence[Path]
    run_dirs: Sequence[Path]
    nodes: int
    requeue: bool
    output: Path


def render(job: Job, profile: Profile) -> str:
    """The script's text."""
    template = (FOLDER / "train.sbatch").read_text(encoding="utf-8")
    shebang, rest = template.split("\n", 1)
    comments = rest[rest.index("#\n") : rest.index(_SETTINGS)]
    body = rest[rest.index(_END) :]
    directives = [f"#SBATCH {option}" for option in _directives(job, profile)]
    return "\n".join([shebang, *directives, comments + "\n".join(_settings(job, profile)), body])


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
        "output": job.output,
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    if len(job.configs) > 1:
        lines.append(f"--array=0-{len(job.configs) - 1}")
    return [*lines, "--requeue" if job.requeue else "--no-requeue", *profile.sbatch]


def _settings(job: Job, profile: Profile) -> list[str]:
    def array(name: str, values: Sequence[object]) -> str:
        return f"{name}=({' '.join(shlex.quote(str(value)) for value in values)})"

    # A Python of the cluster's own, in a container say, has its own packages: it needs this clone and nothing else.
    package = f"{_CLONE}:{_CLONE / 'kernels'}" if profile.python else os.environ.get("PYTHONPATH", "")
    return [
        "# settings: one entry a run of a job array",
        array("CONFIGS", job.configs),
        array("RUN_DIRS", job.run_dirs),
        array("PYTHON", profile.python or [sys.executable]),
        array("SRUN_OPTIONS", profile.srun),
        f"ON_STOP={'requeue' if job.requeue else 'exit'}",
        f"export MEGAHYBRID_SUBMISSION={shlex.quote(job.submission)}",
        *([f"export PYTHONPATH={shlex.quote(package)}"] if package else []),
        *(f"export {name}={shlex.quote(str(value))}" for name, value in profile.environment.items()),
        *profile.setup,
    ]
