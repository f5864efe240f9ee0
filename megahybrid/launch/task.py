"""What every process of a job runs: `python -m megahybrid.launch.task CONFIG`, a task of Slurm a GPU.

One task a GPU, and not torchrun: Slurm already starts, numbers, signals and ends processes on all nodes; torchrun's
agent would only stand between them, and what it restarts Slurm restarts on healthy nodes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from megahybrid.training.signals import StopRequest

GO_ON = 75
"""The exit code for: starting again may do it."""


def main(config_file: str) -> int:
    """Train in the place that Slurm gives this process; returns the exit code."""
    with StopRequest() as stop_request:  # before the imports that take seconds: a warning must not end the process
        os.environ.update(places(os.environ))
        from megahybrid.cli import quieten_libraries
        from megahybrid.config import load_config
        from megahybrid.errors import MachineFault, UserError
        from megahybrid.retry import retry
        from megahybrid.training import failures
        from megahybrid.training.loop import train
        from megahybrid.training.run_directory import RunDirectory

        quieten_libraries()
        try:
            config = retry(lambda: load_config(Path(config_file)), f"Reading {config_file}")
        except MachineFault as error:  # the verdict's word for "again": where the run is, is not known here
            print(f"megahybrid: {error}", file=sys.stderr, flush=True)
            return GO_ON
        run = RunDirectory(config.run.dir)
        try:
            train(config, lambda text: print(text, flush=True), stop_request)
        except BaseException as error:
            failures.record(run, error)
            if not isinstance(error, UserError):
                raise
            print(f"megahybrid (rank {os.environ['RANK']}): {error}", file=sys.stderr, flush=True)
            return 1
    return 0


def places(slurm: Mapping[str, str]) -> dict[str, str]:
    """torch.distributed's variables from those of a Slurm task."""
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": str(int(slurm["SLURM_NTASKS"]) // int(slurm["SLURM_NNODES"])),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
