"""The sum of what many programs of a kernel found of one parameter's gradient."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.integers import cdiv
from megahybrid_kernels.launch import kernel

# Values of a program, and shares that it adds at once.
_BLOCK, _ROWS = 32, 128


@kernel(do_not_specialize=["count"])
def sum_shares_kernel(
    shares, total, count, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """shares: `[count, WIDTH * COLUMNS]`, total: `[COLUMNS, WIDTH]`."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < WIDTH * COLUMNS
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        places = row.to(tl.int64)[:, None] * (WIDTH * COLUMNS) + place[None, :]
        acc += tl.load(shares + places, mask=(row < count)[:, None] & inside[None, :], other=0)
    target = total + place % COLUMNS * WIDTH + place // COLUMNS
    tl.store(target, tl.sum(acc, 0).to(total.dtype.element_ty), mask=inside)


def sum_shares(shares: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a parameter `[columns]` or `[columns, width]`, in its dtype, summed in a fixed order.

    shares: fp32 `[count, columns]` or `[count, width, columns]`, contiguous.
    """
    total = torch.empty(*parameter.shape, dtype=parameter.dtype, device=parameter.device)
    width = parameter.shape[1] if parameter.dim() == 2 else 1
    sum_shares_kernel[cdiv(parameter.numel(), _BLOCK)](
        shares, total, len(shares), COLUMNS=len(parameter), WIDTH=width, BLOCK=_BLOCK, ROWS=_ROWS
    )
    return total
