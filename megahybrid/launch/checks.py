"""What a job would refuse before its first step, found where it is submitted: all that needs no GPU and no node."""

from __future__ import annotations

from pathlib import Path

from megahybrid.config import Config
from megahybrid.config.validate import check_replicas
from megahybrid.data.loader import TrainingData, ValidationData
from megahybrid.data.opened import OpenedData
from megahybrid.errors import UserError
from megahybrid.training.checkpoint_folder import NoCheckpoint
from megahybrid.training.resume import Start, initial_weights


def check_start(config: Config, nodes: int, gpus_per_node: int) -> None:
    """Raises UserError for the first thing that would keep a run from starting on so many GPUs, or from going on.

    Of data.remote nothing is read: what reaches it are the nodes, through a folder on their own disks.
    """
    replicas = _replicas(config, nodes, gpus_per_node)
    check_replicas(config, replicas)
    _kernels(config)
    data = None if config.data.remote is not None else _data(config, replicas)
    start = _start(config)
    if start.checkpoint is not None:
        _going_on(config, start, data)
    elif (weights := initial_weights(config)) is not None:
        _starting_from(config, weights)


def _start(config: Config) -> Start:
    """Where the run goes on. A trunk that is not there by now may be trained by a job for which this one waits."""
    back_to = config.train.resume_from
    try:
        return Start.of(config, back_to)
    except NoCheckpoint:
        if back_to is not None:
            raise
        return Start()


def _replicas(config: Config, nodes: int, gpus_per_node: int) -> int:
    gpus, replica = nodes * gpus_per_node, config.parallel.replica
    if gpus % replica:
        raise UserError(
            f"{nodes} nodes of {gpus_per_node} GPUs are {gpus}, which is no multiple of "
            f"parallel.tensor * parallel.context * parallel.pipeline = {replica}; change --nodes, --gpus-per-node or "
            "the layout."
        )
    return gpus // replica


def _kernels(config: Config) -> None:
    """Raises UserError for head dims on which training on a GPU does not begin."""
    import torch

    from megahybrid.devices import DTYPES
    from megahybrid.model.fallbacks import kernel_notes

    kernel_notes(config, torch.device("cuda"), DTYPES[config.train.dtype], training=True)


def _data(config: Config, replicas: int) -> OpenedData:
    """The data, whose files are all there, have their sizes and fit the configuration."""
    with TrainingData(config, 0, replicas) as training, ValidationData(config, 0, replicas):
        return training.opened


def _going_on(config: Config, start: Start, data: OpenedData | None) -> None:
    from megahybrid.training import checkpoint  # seconds of imports, which a new run does not need

    start.check(config)
    found = start.checkpoint
    facts = checkpoint.read_state(found)
    position = facts["position"]
    if position["step"] >= config.train.steps:
        raise UserError(
            f"'{found}' is at step {position['step']} of train.steps = {config.train.steps}: there is nothing left to "
            "do; give a larger train.steps, or another run.dir."
        )
    if data is not None:
        start.check_data(config, position["data"], data)
    if fault := checkpoint.lost_file(found, facts):
        raise UserError(fault)


def _starting_from(config: Config, weights: Path) -> None:
    from megahybrid.scaling.parameters import parameter_specs
    from megahybrid.training import checkpoint

    facts = checkpoint.read_facts(weights)
    if fault := checkpoint.other_model(weights, facts, parameter_specs(config)) or checkpoint.lost_file(weights, facts):
        raise UserError(fault)
