"""The cache of attention over a window: a ring of its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of a window's tokens, a ring: slot = position % window_size.

    Attributes:
        k, v: `[sequences, kv_heads, window_size, head_dim]`.
        positions: int64 `[sequences, window_size]`, absolute position of each slot's token, -1 for a blank slot.
    """

    k: Tensor
    v: Tensor
    positions: Tensor

    @classmethod
    def empty(
        cls,
        count: int,
        heads: int,
        head_dim: int,
        window_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> KeyValueCache:
        """Cache of `count` sequences that have not begun."""
        k = torch.zeros(count, heads, window_size, head_dim, dtype=dtype, device=device)
        return cls(k, torch.zeros_like(k), torch.full((count, window_size), -1, device=device))
