"""The cache of native sparse attention: keys and values, and the means of each complete block of them."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from megahybrid_kernels.attention.growing_cache import GrowingCache
from megahybrid_kernels.native_sparse_attention.pooling import pool
from megahybrid_kernels.sequences import Sequences


class NSACache(GrowingCache):
    """All earlier tokens as a `GrowingCache` has them, and in the same room a mean of each complete block's keys and
    values, which queries then need not read a block for."""

    @classmethod
    def empty(
        cls,
        count: int,
        heads: int,
        head_dim: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Cache of `count` sequences that have not begun."""
        spans = (1, 1, block_size, block_size)
        return super().empty(count, heads, head_dim, dtype=dtype, device=device, spans=spans)

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.room.spans[2]

    @property
    def pooled_k(self) -> Tensor:
        """`[sequences, kv_heads, blocks, head_dim]`; those from a sequence's complete blocks on mean nothing, but are
        finite."""
        return self.room.rows[2][:, :, : self.slots // self.block_size]

    @property
    def pooled_v(self) -> Tensor:
        """As `pooled_k`."""
        return self.room.rows[3][:, :, : self.slots // self.block_size]

    def append(self, k: Tensor, v: Tensor, sequences: Sequences, pooled: tuple[Tensor, Tensor] | None = None) -> Self:
        """As a `GrowingCache` does; blocks that these tokens complete are pooled as whole documents' are.

        pooled: their means, `[blocks of all sequences, kv_heads, head_dim]` with a last, incomplete one of each, of
        sequences of one length that begin here.
        """
        new, size = super().append(k, v, sequences), self.block_size
        completed = sum(b // size - a // size for a, b in zip(self.lengths, new.lengths, strict=True))
        if completed == 0:
            return new
        if pooled is not None:
            each = completed // self.count
            for means, x in zip(new.room.rows[2:], pooled, strict=True):
                means[:, :, :each] = x.unflatten(0, (self.count, -1))[:, :each].transpose(1, 2)
            return new
        tokens = sequences.cu_seqlens.diff().long()
        starts = torch.zeros_like(tokens) if sequences.starts is None else sequences.starts
        counts = (starts + tokens) // size - starts // size
        number = torch.arange(completed, device=k.device)
        sequence = torch.searchsorted(counts.cumsum(0), number, right=True)
        block = number + (starts // size - counts.cumsum(0) + counts)[sequence]
        whole = new.capacity // size * size
        for rows, means in zip((new.room.k, new.room.v), new.room.rows[2:], strict=True):
            blocks = rows[:, :, :whole].unflatten(2, (-1, size))[sequence, :, block]
            means[sequence, :, block] = pool(blocks.transpose(1, 2))
        return new
