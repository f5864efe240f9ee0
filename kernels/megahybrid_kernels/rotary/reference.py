"""Rotary position embedding in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.precision import at_least_fp32
from megahybrid_kernels.rotary.phases import RADIANS, frequencies


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """See `megahybrid_kernels.rotary`."""
    first, second = at_least_fp32(x).chunk(2, -1)
    phases = positions.to(torch.int64)[:, None] * frequencies(first.shape[-1], theta, x.device)
    angles = (phases.to(first.dtype) * RADIANS)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
