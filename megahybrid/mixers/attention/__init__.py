"""Softmax attention with grouped queries and rotary embedding: full and sliding window."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from megahybrid.errors import UserError
from megahybrid.key import key
from megahybrid.mixers.counting import linear, mean_of_min
from megahybrid.mixers.kind import Activations, Kind, MicroBatch

if TYPE_CHECKING:
    from megahybrid.config.schema import ModelConfig
    from megahybrid.model.mixer import Mixer
    from megahybrid_kernels.judging.case import Shape


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
    rope_theta: float | None = key(10000.0)
    """Base of the rotary position embedding; null for none, which leaves order to the layers between."""
    qk_norm: bool = key(False)
    """Whether each head's queries and keys have an RMS norm before rotary embedding, with one weight for all heads
    (Qwen 3, arXiv 2505.09388). The paper's models have none; without, logits may grow at high learning rates."""


class Heads(Protocol):
    """What a section that has the heads of softmax attention says of them; the keys mean what AttentionConfig's do."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool


class AttentionKind(Kind):
    """What all kinds of softmax attention share; `section` has their heads."""

    sections: ClassVar = {"attention": AttentionConfig}
    section = "attention"

    def heads(self, model: ModelConfig) -> Heads:
        """The section that has its heads."""
        return getattr(model, self.section)

    def check(self, model: ModelConfig) -> None:
        where, heads = f"model.{self.section}", self.heads(model)
        if heads.num_heads % heads.num_kv_heads:
            raise UserError(
                f"{where}.num_heads ({heads.num_heads}) must be a multiple of {where}.num_kv_heads "
                f"({heads.num_kv_heads})."
            )
        if heads.head_dim % 2:
            raise UserError(f"{where}.head_dim must be even, since rotary embedding pairs its halves.")

    def split(self, model: ModelConfig) -> dict[str, int]:
        return {f"model.{self.section}.num_heads": self.heads(model).num_heads}

    def shared(self, model: ModelConfig) -> dict[str, int]:
        return {f"model.{self.section}.num_kv_heads": self.heads(model).num_kv_heads}

    def exchanged(self, model: ModelConfig) -> int:
        heads = self.heads(model)
        return 2 * (heads.num_heads + heads.num_kv_heads) * heads.head_dim

    @abstractmethod
    def keys(self, model: ModelConfig, length: int) -> float:
        """Keys that a query sees, averaged over the positions of a document of `length` tokens."""

    def flops(self, model: ModelConfig, length: int) -> dict[str, float]:
        """Projections, of which q and output are as wide as the query heads, k and v as the KV heads; and softmax
        attention: products q . k and p v, of 2 head_dim each, a query head and key."""
        heads = self.heads(model)
        width = 2 * (heads.num_heads + heads.num_kv_heads) * heads.head_dim
        return {
            "projections": linear(model.hidden_size, width),
            "attention": heads.num_heads * 4 * heads.head_dim * self.keys(model, length),
        }

    def activations(self, model: ModelConfig, batch: MicroBatch) -> Activations:
        """Of torch's flash attention q, k and v, repeated for every query head, and output, 4 w Q, with w bytes an
        activation and queries of width Q on a rank, and the output exchanged, w Q; backward their gradients, and q's
        in fp32 before. fp32 goes block by block, with one mask for all KV heads."""
        queries, keys = widths(model.attention, batch)
        if batch.width == 2:
            kept = Activations((8 + 2 * batch.exchanged) * queries, 12 * queries)
        else:
            kept = self._blocked(model, batch, queries, keys)
        return kept._replace(saved=kept.saved + unnormalised(model.attention, batch))

    def _blocked(self, model: ModelConfig, batch: MicroBatch, queries: float, keys: float) -> Activations:
        """`attention.reference` on a GPU, for a document as long as the sample, the most that there can be.

        q, output before and after it is joined, w Q each, and with grouped queries two copies more (the joined one is
        not kept where it is exchanged, but what comes of it is); k and v, 2 w K; and the mask, as SDPA adds it to the
        logits: w a head and column, where a block of queries has the columns that its last query reaches. Backward:
        gradients of q and the output, of k and v and of what a block adds to them.
        """
        from megahybrid_kernels.attention.reference import QUERY_BLOCK

        (_, group, _), width = rank_heads(model.attention, batch.ranks), batch.width
        copies = 3 if group == 1 else 5
        columns = self.keys(model, batch.length) + min(QUERY_BLOCK, batch.length) / 2
        saved = width * (copies * queries + 2 * keys + group * columns)
        return Activations(saved, width * (2 * queries + 4 * keys))


def rank_heads(heads: Heads, ranks: int) -> tuple[int, int, int]:
    """KV heads of a rank, query heads for each, and channels of a head."""
    kv_heads = max(1, heads.num_kv_heads // ranks)
    return kv_heads, heads.num_heads // ranks // kv_heads, heads.head_dim


def judged_attention(model: ModelConfig, ranks: int, window: int | None) -> list[Shape]:
    """Attention to `window` keys, or all, with its rotary embedding, as `Kind.judged`."""
    from megahybrid_kernels.judging import shapes

    heads, groups, head_dim = rank_heads(model.attention, ranks)
    return [shapes.Attention(heads, head_dim, groups, window), *judged_heads(model.attention, ranks)]


def widths(heads: Heads, batch: MicroBatch) -> tuple[int, int]:
    """Channels of a rank's queries and of its keys, over all heads."""
    kv_heads, group, head_dim = rank_heads(heads, batch.ranks)
    return kv_heads * group * head_dim, kv_heads * head_dim


def unnormalised(heads: Heads, batch: MicroBatch) -> float:
    """Bytes a token of queries and keys as they are before their norm, which keeps them, if there is one."""
    return batch.width * sum(widths(heads, batch)) * heads.qk_norm


def judged_heads(heads: Heads, ranks: int) -> list[Shape]:
    """What makes queries and keys of projections, as `Kind.judged`."""
    from megahybrid_kernels.judging import shapes

    kv_heads, groups, head_dim = rank_heads(heads, ranks)
    norms = [shapes.RMSNorm(head_dim)] if heads.qk_norm else []
    return [*norms, shapes.Rotary(kv_heads * groups, head_dim)]


class FullAttentionKind(AttentionKind):
    """Causal attention to the whole document."""

    letter = "F"
    title = "full attention"
    utilisation = 0.376, 0.455
    launches = 37

    def keys(self, model: ModelConfig, length: int) -> float:
        """The query at position i sees i + 1 keys."""
        return mean_of_min(length, length)

    def window(self, model: ModelConfig) -> float:
        return math.inf

    def judged(self, model: ModelConfig, ranks: int) -> list[Shape]:
        return judged_attention(model, ranks, None)

    def module(self) -> type[Mixer]:
        from megahybrid.mixers.attention.module import FullAttention

        return FullAttention

    def exported(self) -> type:
        from megahybrid.mixers.attention.hf import FullAttention

        return FullAttention


class SlidingWindowKind(AttentionKind):
    """Causal attention to the last `window_size` tokens of the document, the query's own included."""

    letter = "S"
    title = "sliding window"
    launches = 37

    def keys(self, model: ModelConfig, length: int) -> float:
        """The query at position i sees min(i + 1, n) keys in a window of n."""
        return mean_of_min(length, model.attention.window_size)

    def window(self, model: ModelConfig) -> float:
        return model.attention.window_size

    def activations(self, model: ModelConfig, batch: MicroBatch) -> Activations:
        """Where a context parallel rank keeps its tokens, of so many more as are in a window."""
        every = super().activations(model, batch)
        if batch.rows == 1:
            return every
        more = 1 + (model.attention.window_size - 1) / (batch.samples * batch.length)
        return Activations(*(more * each for each in every))

    def passed_on(self, model: ModelConfig, ranks: int, width: int) -> float:
        """Keys and values of the window before a rank's first token."""
        attention = model.attention
        return width * 2 * attention.num_kv_heads * attention.head_dim * (attention.window_size - 1)

    def close_limits(self, model: ModelConfig) -> dict[str, dict[str, int]]:
        return {"attention": {"window_size": 24}}

    def judged(self, model: ModelConfig, ranks: int) -> list[Shape]:
        return judged_attention(model, ranks, model.attention.window_size)

    def module(self) -> type[Mixer]:
        from megahybrid.mixers.attention.module import SlidingWindowAttention

        return SlidingWindowAttention

    def exported(self) -> type:
        from megahybrid.mixers.attention.hf import WindowAttention

        return WindowAttention
