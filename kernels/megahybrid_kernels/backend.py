"""Which tensors the Triton kernels take.

Ops whose kernels have limits of their own say so by a public function `unsupported`, which their dispatch reads, too: a
reason, the end of the sentence "its kernels …", or None where they take what is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.targets import table_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_HEAD_DIM = 256
# Elements from row to row, below which the last of 64 rows is within 32 bits of the first.
_FARTHEST_ROWS = 2**25


def takes_triton(x: Tensor, *others: Tensor | None, dtypes: tuple[torch.dtype, ...] = _DTYPES) -> bool:
    """Whether an op on `x` runs its Triton kernels: on a GPU that they have launches for, with x of one of `dtypes`,
    which are floats of at most 32 bits when left out. All else is PyTorch's.

    others: all that the op reads beside x. Raises ValueError when one is on another device, where PyTorch's own ops
    raise but a kernel would read what is not there.
    """
    if not x.is_cuda or x.dtype not in dtypes or table_of(x.device) is None:
        return False
    check_devices(x, *others)
    return True


def unsupported_head_dims(dtype: torch.dtype, *head_dims: int) -> str | None:
    """`unsupported` of kernels that hold a head's row in a tile."""
    if table_of(torch.device("cuda")) is None:
        return f"have no launches for this GPU, {torch.cuda.get_device_name()}"
    if dtype not in _DTYPES:
        return f"take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if max(head_dims) > _LARGEST_HEAD_DIM:
        return f"take head dims up to {_LARGEST_HEAD_DIM}, not {max(head_dims)}"
    return None


def check_devices(x: Tensor, *others: Tensor | None) -> None:
    """Raises ValueError when not all are on x's device."""
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(f"an op's inputs are on {x.device} and {other.device}: move them to one device")


def dense_rows(x: Tensor) -> Tensor:
    """`x` as kernels read it: the values of its last dimension beside each other, and rows not so far apart that the
    offsets within a tile of 64 need more than 32 bits; copied where it is not."""
    return x if x.stride(-1) == 1 and x.stride(0) < _FARTHEST_ROWS else x.contiguous()
