"""Arithmetic precision shared by the PyTorch paths."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when it already is float32 or float64."""
    return x.to(accumulator(x.dtype))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that `at_least_fp32` gives what has `dtype`."""
    return torch.promote_types(dtype, torch.float32)
