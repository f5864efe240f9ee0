"""The mean of a block, whose order of additions training, prefill and decode share."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.precision import at_least_fp32


def pool(rows: Tensor) -> Tensor:
    """Means of `[blocks, block_size, ...]` over each block, in the dtype of the rows.

    Summed in at least fp32, in an order that depends on `block_size` alone: a block that fills up while tokens are
    generated has bit for bit the mean that it has in training.
    """
    total = at_least_fp32(rows)
    while (size := total.shape[1]) > 1:
        half = size // 2
        total = torch.cat([total[:, :half] + total[:, half : 2 * half], total[:, 2 * half :]], 1)
    return (total[:, 0] / rows.shape[1]).to(rows.dtype)
