"""The products in PyTorch, which knows no `ahead`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid_kernels.precision import at_least_fp32


def _product(row: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    return F.linear(row.reshape(1, -1), at_least_fp32(weight)).to(like.dtype)


def _scaled(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    x = at_least_fp32(x)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.to(x.dtype)


def add_rms_norm_gemv(
    x: Tensor,
    residual: Tensor | None,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    total: Tensor | None,
    ahead: bool = False,
) -> Tensor:
    """See `megahybrid_kernels.gemv`."""
    if total is not None:
        x = torch.add(x, residual, out=total)
    return _product(_scaled(x.reshape(-1), norm, eps), weight, x)


def gated_rms_norm_gemv(
    x: Tensor, gate: Tensor, norm: Tensor, eps: float, weight: Tensor, ahead: bool = False
) -> Tensor:
    """See `megahybrid_kernels.gemv`."""
    return _product(_scaled(x, norm, eps) * F.silu(at_least_fp32(gate)), weight, x)


def swiglu_gemv(gate: Tensor, up: Tensor, weight: Tensor, ahead: bool = False) -> Tensor:
    """See `megahybrid_kernels.gemv`."""
    return _product(F.silu(at_least_fp32(gate)) * at_least_fp32(up), weight, up)
