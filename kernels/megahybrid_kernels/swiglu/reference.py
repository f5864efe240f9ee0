"""SwiGLU's product in PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megahybrid_kernels.precision import at_least_fp32


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `megahybrid_kernels.swiglu`."""
    return (F.silu(at_least_fp32(gate)) * at_least_fp32(up)).to(up.dtype)
