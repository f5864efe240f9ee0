"""AdamW's parameter groups and the learning rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from megahybrid.config.schema import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on the parameters whose spec asks for it."""
    decayed = [p for p in model.parameters() if p.spec.weight_decay]
    plain = [p for p in model.parameters() if not p.spec.weight_decay]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=tuple(config.betas), eps=config.eps)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of the 1-based optimizer step: linear warm-up to the peak, then a cosine to min_ratio of it."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.min_ratio + (1 - config.min_ratio) * cosine)
