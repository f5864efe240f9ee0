"""AdamW on shards of flat weights, its updates, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megahybrid.config.branching import decay_start
from megahybrid.config.schema import OptimizerConfig
from megahybrid.parallel import groups
from megahybrid.training.zero import MOMENTS


def make_optimizer(buckets: Sequence[Sequence[nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """A fused AdamW with weight decay on the groups of parameters whose specs ask for it."""
    every = [
        {"params": list(group), "weight_decay": config.weight_decay if group[0].spec.weight_decay else 0.0}
        for group in buckets
    ]
    return torch.optim.AdamW(every, lr=config.learning_rate, betas=tuple(config.betas), eps=config.eps, fused=True)


def reset_state(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """AdamW's state as after `steps` steps, with moments of zero."""
    for group in optimizer.param_groups:
        for master in group["params"]:
            state = optimizer.state[master]
            state["step"] = torch.full((), float(steps), device=master.device)  # where a fused AdamW has it
            for kind in MOMENTS:
                state[kind] = state[kind].zero_() if kind in state else torch.zeros_like(master.data)


@torch.no_grad()
def update(
    optimizer: torch.optim.Optimizer, shards: Sequence[Tensor], norm: Tensor, refused: Tensor, clip: float
) -> None:
    """Clip and step; where refused nothing changes, AdamW's count of steps included. The host does not wait.

    Args:
        shards: of gradients, summed over those that hold the same weights; one of each parameter group's master.
        norm: of the whole gradient, their mean; on the device.
        refused: bool, on the device.
        clip: the largest norm; 0 for any.
    """
    scale = ((norm + 1e-6) / clip).clamp(min=1) if clip else torch.ones_like(norm)
    holders = groups.weight_holders()[1]
    optimizer.grad_scale = (scale * holders if holders > 1 else scale).float()  # what gradients are divided by
    optimizer.found_inf = refused.float()
    for group, shard in zip(optimizer.param_groups, shards, strict=True):
        group["params"][0].grad = shard
    optimizer.step()


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of the 1-based optimizer step: linear warm-up to the peak, then `schedule` to the last step.

    cosine falls to min_ratio of the peak; wsd (warm-up, stable, decay) rests until `decay_start` and then falls
    linearly to min_ratio; constant rests.
    """
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        shape = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        shape = min(1.0, max(0, steps - step) / (steps - decay_start(config, steps)))
    return config.learning_rate * (config.min_ratio + (1 - config.min_ratio) * shape)
