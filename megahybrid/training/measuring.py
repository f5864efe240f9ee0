"""How fast a recipe trains: as a run has trained, or as some steps of it show."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

from megahybrid.config import Config, save_config
from megahybrid.config.schema import ParallelConfig
from megahybrid.errors import UserError
from megahybrid.scaling.hours import Estimate, by_utilisation, own_steps
from megahybrid.training.metrics_file import lines_backwards
from megahybrid.training.run_directory import RunDirectory

_LINES = 1000  # of a run, the last ones
_WARM_UP = 10  # steps of a run, in which kernels are compiled
_PROBED = (3, 10)  # steps of a probe to warm up, and those that count
_MICRO_BATCHES = 8  # of a probe, at most
_OF_A_GROUP = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}  # the environment that torchrun makes


def measured(config: Config, run_dir: Path) -> Estimate:
    """A recipe's GPU hours at the median MFU of a run's last steps. Raises UserError where the run has none."""
    path = RunDirectory(run_dir).metrics
    if not path.is_file():
        raise UserError(f"There is no {path}; give the directory of a run that has trained.")
    found = [line["mfu"] for line in islice(lines_backwards(path), _LINES) if "mfu" in line and line["step"] > _WARM_UP]
    if not found:
        raise UserError(f"{path} has no mfu after step {_WARM_UP}; give a run that has trained longer, on a known GPU.")
    return by_utilisation(config, statistics.median(found), f"median of {len(found)} steps of {run_dir}")


def probe(config: Config) -> Estimate:
    """A recipe's GPU hours from some real steps on this machine's first GPU, or on its CPU, in a process of their own
    (trial.py).

    They read no data: tokens are random, each sample is one document, and heads that choose what they keep stand
    where they begin. Of many micro-batches a few are run, and the seconds multiplied. Raises UserError where they
    fail.
    """
    train = config.train
    count = train.global_batch_size // train.micro_batch_size
    few = min(count, _MICRO_BATCHES)
    small = replace(
        config,
        parallel=ParallelConfig(gradient_reduction=config.parallel.gradient_reduction),
        train=replace(train, global_batch_size=few * train.micro_batch_size),
    )
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_GROUP}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        save_config(small, file)
        command = [sys.executable, "-m", "megahybrid.training.trial", str(file), str(sum(_PROBED))]
        trial = subprocess.run(command, env=environment, capture_output=True, text=True)
    if trial.returncode:
        last = (trial.stderr.strip().splitlines() or ["without a word"])[-1]
        raise UserError(f"A probe of '{config.run.dir}' failed: {last[:300]}")
    found = json.loads(trial.stdout.splitlines()[-1])
    seconds = statistics.median(found["seconds"][_PROBED[0] :]) * count / few
    return Estimate(found["device"], seconds, own_steps(config), f"a probe of {_PROBED[1]} steps")
