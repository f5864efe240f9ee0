"""Rotary position embedding in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.precision import at_least_fp32


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """See `megahybrid_kernels.rotary`."""
    first, second = at_least_fp32(x).chunk(2, -1)
    exponents = torch.arange(first.shape[-1], dtype=first.dtype, device=x.device) / first.shape[-1]
    angles = (positions.to(first.dtype)[:, None] * theta**-exponents)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
