"""Root-mean-square norms in PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megahybrid_kernels.precision import at_least_fp32


def _scaled(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = at_least_fp32(x)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `megahybrid_kernels.norm`."""
    return _scaled(x, weight, eps).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `megahybrid_kernels.norm`."""
    return (_scaled(x, weight, eps) * F.silu(at_least_fp32(gate))).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `megahybrid_kernels.norm`."""
    total = x + residual
    return rms_norm(total, weight, eps), total
