"""The mean of a block, of which training, prefill and decode find the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.precision import at_least_fp32


def pool(rows: Tensor) -> Tensor:
    """Means of `[blocks, block_size, ...]` over each block, in the dtype of the rows.

    Summed in at least fp32, in an order that depends on `block_size` alone: a block that fills up while tokens are
    generated has bit for bit the mean that it has in training.
    """
    return (fixed_sum(at_least_fp32(rows)) / rows.shape[1]).to(rows.dtype)


def fixed_sum(x: Tensor) -> Tensor:
    """Over dimension 1, in an order that depends on its size alone, which torch's own does not promise."""
    while (size := x.shape[1]) > 1:
        half = size // 2
        pairs = x[:, :half] + x[:, half : 2 * half]
        x = torch.cat([pairs, x[:, -1:]], 1) if size % 2 else pairs
    return x[:, 0]
