"""Which tensors the Triton kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes_triton(x: Tensor) -> bool:
    """Whether an op on `x` runs its Triton kernels: on a GPU, in at most 32 bits. All else is PyTorch's."""
    return x.is_cuda and x.dtype in _DTYPES


def dense_rows(x: Tensor) -> Tensor:
    """`x` with the values of its last dimension beside each other, as kernels read them; copied where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()
