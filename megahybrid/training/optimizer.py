"""AdamW with steps that can be left out, its parameter groups, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from megahybrid.config.branching import decay_start
from megahybrid.config.schema import OptimizerConfig


class SkippableAdamW(torch.optim.AdamW):
    """A fused AdamW that asks `accept` before every update, and without it changes nothing, its step count included.

    With ZeRO-3 DeepSpeed computes the gradient's norm inside its own step, so this is the place between norm and
    update. With 1 and 2 the device knows (sharded.py), and the host accepts all.
    """

    accept: Callable[[], bool] = staticmethod(lambda: True)

    def step(self, closure=None):
        return super().step(closure) if self.accept() else None


def make_optimizer(groups: Sequence[Sequence[nn.Parameter]], config: OptimizerConfig) -> SkippableAdamW:
    """AdamW with weight decay on the groups of parameters whose specs ask for it."""
    every = [
        {"params": list(group), "weight_decay": config.weight_decay if group[0].spec.weight_decay else 0.0}
        for group in groups
    ]
    return SkippableAdamW(every, lr=config.learning_rate, betas=tuple(config.betas), eps=config.eps, fused=True)


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
