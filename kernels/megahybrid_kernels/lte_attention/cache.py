"""The cache of attention under learnable token eviction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megahybrid_kernels.precision import accumulator


@dataclass(frozen=True)
class LTECache:
    """What each KV head keeps of earlier tokens: an exact window and an eviction buffer.

    Attributes:
        k, v: `[sequences, kv_heads, window_size + 1, head_dim]`, ring of the last tokens, slot = position % slots.
        positions: int64 `[sequences, window_size + 1]`, -1 for a blank slot.
        score: `[sequences, kv_heads, window_size + 1]`, 0 where the score has not arrived yet.
        buffer_k, buffer_v: `[sequences, kv_heads, buffer_size, head_dim]`, what the next query finds in the buffer.
        buffer_score, buffer_positions: `[sequences, kv_heads, buffer_size]`, position -1 for a blank slot.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    score: Tensor
    buffer_k: Tensor
    buffer_v: Tensor
    buffer_score: Tensor
    buffer_positions: Tensor

    @classmethod
    def empty(
        cls,
        count: int,
        heads: int,
        head_dim: int,
        window_size: int,
        buffer_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> LTECache:
        """Cache of `count` sequences that have not begun."""

        def zeros(slots: int, *width: int, dtype: torch.dtype = dtype) -> Tensor:
            # Each in memory of its own, which a step may write to.
            return torch.zeros(count, heads, slots, *width, dtype=dtype, device=device)

        slots, score_dtype = window_size + 1, accumulator(dtype)
        return cls(
            k=zeros(slots, head_dim),
            v=zeros(slots, head_dim),
            positions=torch.full((count, slots), -1, device=device),
            score=zeros(slots, dtype=score_dtype),
            buffer_k=zeros(buffer_size, head_dim),
            buffer_v=zeros(buffer_size, head_dim),
            buffer_score=zeros(buffer_size, dtype=score_dtype),
            buffer_positions=torch.full((count, heads, buffer_size), -1, device=device),
        )
