"""What a cluster wants to be told: read from a YAML file, one a cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megahybrid.errors import UserError

FOLDER = Path(__file__).parents[2] / "slurm"


@dataclass
class Profile:
    """A cluster."""

    partition: str | None = None
    """Slurm's partition; the cluster's default when left out."""
    account: str | None = None
    """The project that is charged."""
    qos: str | None = None
    """Quality of service."""
    gpus_per_node: int = 8
    """GPUs a node has, as many processes are started on it."""
    gpu_type: str | None = None
    """The GPUs' type, where the cluster has several, such as h100."""
    cpus_per_gpu: int = 8
    """CPU cores for each process."""
    mem: str | None = None
    """Host memory a node, such as 512G; 0 for all of it."""
    time: str = "24:00:00"
    """Time limit of a job."""
    signal_seconds: int = 300
    """How long before the limit the job is warned: enough for a step and a checkpoint."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before training, such as module load …, or activating an environment."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of all processes, such as NCCL_SOCKET_IFNAME."""
    python: list[str] | None = None
    """The command that runs Python in the job, behind a container's command if it has one, such as
    [apptainer, exec, --nv, image.sif, python]; the interpreter that submits when left out. It needs to be 3.11 or
    newer and to have the packages of pyproject.toml; of megahybrid the submission's copy is run, whatever it has."""
    srun: list[str] = field(default_factory=list)
    """More options of srun, such as --container-image=…"""
    sbatch: list[str] = field(default_factory=list)
    """More options of sbatch, one an entry, such as --exclusive or --constraint=h100."""


def load_profile(name: str) -> Profile:
    """Read slurm/profiles/NAME.yaml, or the file of that path. Raises UserError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / "profiles" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in (FOLDER / "profiles").glob("*.yaml")))
        raise UserError(f"There is no profile '{path}'; give a YAML file, or one of {known}.")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Profile), OmegaConf.load(path)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"The profile '{path}' cannot be read: {str(error).splitlines()[0]}.") from error
