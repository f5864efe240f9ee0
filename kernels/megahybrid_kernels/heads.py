"""Query heads that share key-value heads, as launches of attention kernels need to know them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megahybrid_kernels.integers import tile_width
from megahybrid_kernels.online_softmax import dot_precision, log2_scale


@dataclass(frozen=True)
class Heads:
    """Sizes of q `[tokens, query_heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]`.

    Attributes:
        tokens: of all documents.
        groups: query heads of a KV head.
    """

    tokens: int
    kv_heads: int
    groups: int
    head_dim: int

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.groups

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def log2_scale(self) -> float:
        return log2_scale(self.head_dim)

    def constants(self, dtype: torch.dtype) -> dict[str, object]:
        """constexpr arguments that the kernels with products share."""
        return {"HEAD_DIM": self.head_dim, "WIDTH": tile_width(self.head_dim), "PRECISION": dot_precision(dtype)}


def row_strides(*tensors: Tensor) -> list[int]:
    """Of tokens and heads of each."""
    return [stride for x in tensors for stride in x.stride()[:2]]
