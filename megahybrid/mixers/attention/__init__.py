"""Softmax attention with grouped queries and rotary embedding: full and sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megahybrid.errors import UserError
from megahybrid.key import key
from megahybrid.mixers.kind import Kind

if TYPE_CHECKING:
    from megahybrid.config.schema import ModelConfig


@dataclass
class AttentionConfig:
    """Softmax attention: full (F), sliding window (S), and the heads of LTE (L)."""

    num_heads: int = key(16)
    """Query heads."""
    num_kv_heads: int | None = key(None, otherwise=lambda attention: attention.num_heads)
    """Key-value heads; num_heads when left out."""
    head_dim: int = key(64)
    """Channels of a head."""
    window_size: int = key(1024)
    """Keys that a sliding-window query (S) sees, itself included."""
    rope_theta: float = key(10000.0)
    """Base of the rotary position embedding."""


class AttentionKind(Kind):
    """What all kinds with the heads of `model.attention` share."""

    sections: ClassVar = {"attention": AttentionConfig}

    def check(self, model: ModelConfig) -> None:
        heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
        if heads % kv_heads:
            raise UserError(
                f"model.attention.num_heads ({heads}) must be a multiple of model.attention.num_kv_heads ({kv_heads})."
            )
        if model.attention.head_dim % 2:
            raise UserError("model.attention.head_dim must be even, since rotary embedding pairs its halves.")

    def split(self, model: ModelConfig) -> dict[str, int]:
        heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
        return {f"model.attention.{'num_heads' if heads == kv_heads else 'num_kv_heads'}": kv_heads}


class FullAttentionKind(AttentionKind):
    """Causal attention to the whole document."""

    letter = "F"
    title = "full attention"


class SlidingWindowKind(AttentionKind):
    """Causal attention to the last `window_size` tokens of the document, the query's own included."""

    letter = "S"
    title = "sliding window"
