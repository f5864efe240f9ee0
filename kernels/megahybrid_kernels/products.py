"""Products that are added to what is there already, in its own precision."""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(total: Tensor, a: Tensor, b: Tensor, begun: bool) -> None:
    """total += a b, or total = a b where not `begun`, whatever stands there; for a and b in fewer bits than total
    without a rounding to theirs, and on GPUs without a product of its own.

    total: `[rows, columns]`, contiguous; a `[rows, n]` and b `[n, columns]`, of one dtype.
    """
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=int(begun), out=total)
    elif a.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, beta=int(begun), out_dtype=total.dtype, out=total)
    else:
        wide = torch.promote_types(total.dtype, a.dtype)
        product = a.to(wide) @ b.to(wide)
        total.add_(product) if begun else total.copy_(product)
