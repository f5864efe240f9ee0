"""Arithmetic precision shared by the PyTorch paths."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when it already is float32 or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
