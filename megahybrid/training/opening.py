"""What a run says of itself before its first step."""

from __future__ import annotations

import math

import torch

from megahybrid.config.branching import decay_start
from megahybrid.config.recording import unrecorded
from megahybrid.config.schema import Config
from megahybrid.data.loader import ValidationData
from megahybrid.data.opened import OpenedData, text_weights
from megahybrid.parallel import groups
from megahybrid.readable import short
from megahybrid.scaling.parameters import parameter_specs
from megahybrid.training.optimizer import learning_rate


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


def rate_jump(trunk: Config, config: Config, step: int) -> str | None:
    """What is to be known of a branch whose schedule is not at the learning rate that its trunk had at this step."""
    before, here = (learning_rate(each.optimizer, step, each.train.steps) for each in (trunk, config))
    if math.isclose(before, here):
        return None
    line = f"At step {step} the trunk's learning rate was {before:.3g}, this run's is {here:.3g} there: it jumps."
    own, its = (decay_start(each.optimizer, each.train.steps) for each in (config, trunk))
    levels = {learning_rate(each.optimizer, min(own, its), each.train.steps) for each in (config, trunk)}
    if trunk.optimizer.schedule == config.optimizer.schedule == "wsd" and len(levels) == 1:
        line += (
            f" The trunk decays from step {its} on, this run from step {own}; a branch from before both does not jump."
        )
    return line


def unvalidated(opened: OpenedData, validation: ValidationData, config: Config) -> list[str]:
    """Lines: what is to be known of text that no validation reads; tasks have nothing to hold out."""
    if opened.prepared is None:
        return []
    if not validation.samples:
        return ["Nothing is held out of the prepared text: there is no validation."]
    lines = []
    if without := [name for name in text_weights(config, opened.prepared) if name not in validation.ends]:
        lines.append(f"Validation is without {', '.join(without)}, of which nothing is held out.")
    if validation.unread:
        lines.append(
            f"Validation is without {', '.join(validation.unread)}: train.validation_samples "
            f"({config.train.validation_samples}) is too small to have a sample of each source; raise it."
        )
    return lines


def _layout(config: Config) -> str:
    """Ranks of each kind, where there are several."""
    parallel, (_, replicas) = config.parallel, groups.data_parallel()
    sizes = {"tensor": parallel.tensor, "context": parallel.context, "pipeline": parallel.pipeline, "data": replicas}
    several = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return f"{several}, ZeRO {parallel.zero_stage}"
