"""Gated DeltaNet (Yang et al., arXiv 2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megahybrid.key import key
from megahybrid.mixers.kind import Kind

if TYPE_CHECKING:
    from megahybrid.config.schema import ModelConfig


@dataclass
class GDNConfig:
    """Gated DeltaNet (pattern letter G)."""

    num_heads: int = key(8)
    """Heads of queries, keys and values."""
    head_dim: int = key(128)
    """Channels of a query or key head."""
    value_head_dim: int | None = key(None, otherwise=lambda gdn: gdn.head_dim)
    """Channels of a value head; head_dim when left out."""
    conv_size: int = key(4)
    """Taps of the causal short convolution on q, k and v."""


class GDNKind(Kind):
    """Gated DeltaNet."""

    letter = "G"
    title = "Gated DeltaNet"
    sections: ClassVar = {"gdn": GDNConfig}

    def split(self, model: ModelConfig) -> dict[str, int]:
        return {"model.gdn.num_heads": model.gdn.num_heads}
