"""What a run says of itself before its first step."""

from __future__ import annotations

import torch

from megahybrid.config.recording import unrecorded
from megahybrid.config.schema import Config
from megahybrid.parallel import groups
from megahybrid.readable import short
from megahybrid.scaling.parameters import parameter_specs


def opening(config: Config) -> list[str]:
    """Lines: the model and where it trains, and how far; what a beginner would rather know now than at the end."""
    train, optimizer, (_, world) = config.train, config.optimizer, groups.world()
    parameters = sum(spec.full_size for spec in parameter_specs(config).values())
    cuda = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads, as torch sees no GPU"
    many = f"{world} processes, {_layout(config)}" if world > 1 else "1 process"
    tokens = train.global_batch_size * train.seq_length
    lines = [
        f"{config.model.pattern}: {short(parameters)} parameters, {train.dtype}; {many}: {where}",
        f"{train.steps:,} steps of {short(tokens)} tokens, {short(train.steps * tokens)} in all; {config.run.dir}",
    ]
    if optimizer.warmup_steps >= train.steps:
        lines.append(
            f"optimizer.warmup_steps ({optimizer.warmup_steps}) leaves nothing of train.steps ({train.steps}): "
            "the learning rate will not get where it is meant to."
        )
    if train.cuda_graph and (why := unrecorded(config, world)):
        lines.append(why)
    return lines


def _layout(config: Config) -> str:
    """Ranks of each kind, where there are several."""
    parallel, (_, replicas) = config.parallel, groups.data_parallel()
    sizes = {"tensor": parallel.tensor, "context": parallel.context, "pipeline": parallel.pipeline, "data": replicas}
    several = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return f"{several}, ZeRO {parallel.zero_stage}"
