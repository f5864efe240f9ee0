"""Native sparse attention, NSA (Yuan et al., arXiv 2502.11089), as laNSA has it (He & Garner, arXiv 2510.20787)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megahybrid.key import key
from megahybrid.mixers.attention import AttentionKind, judged_heads, rank_heads, unnormalised, widths
from megahybrid.mixers.counting import linear, mean_of_min
from megahybrid.mixers.kind import Activations, MicroBatch

if TYPE_CHECKING:
    from megahybrid.config.schema import ModelConfig
    from megahybrid.model.mixer import Mixer
    from megahybrid_kernels.judging.case import Shape

BRANCHES = 3
"""Compressed, selected and window, each with a gate of its own."""


@dataclass
class NSAConfig:
    """Native sparse attention (N): to every block's mean, to all of a few blocks, and to a window.

    Ranges are those of `megahybrid_kernels.native_sparse_attention.limits`, which is not read here: it needs torch.
    """

    num_heads: int = key(32)
    """Query heads."""
    num_kv_heads: int = key(2)
    """Key-value heads; the query heads of one select together."""
    head_dim: int = key(64)
    """Channels of a head."""
    block_size: int = key(64, choices=(16, 32, 64))
    """Tokens of a block, which is pooled to one key and value, and selected as a whole."""
    num_blocks: int = key(16, at_least=3, at_most=64)
    """Blocks that a query selects; the document's first, its own and the one before are always among them."""
    window_size: int = key(512)
    """Keys that a query sees in its window, itself included."""
    rope_theta: float | None = key(10000.0)
    """Base of the rotary position embedding; null for none, which leaves order to the layers between."""
    qk_norm: bool = key(False)
    """As model.attention's."""


class NSAKind(AttentionKind):
    """Native sparse attention."""

    letter = "N"
    title = "NSA"
    sections: ClassVar = {"nsa": NSAConfig}
    section = "nsa"

    def exchanged(self, model: ModelConfig) -> int:
        return super().exchanged(model) + BRANCHES * model.nsa.num_heads

    def flops(self, model: ModelConfig, length: int) -> dict[str, float]:
        """Those of attention, and the projection to the gates."""
        parts = super().flops(model, length)
        gates = linear(model.hidden_size, BRANCHES * model.nsa.num_heads)
        return parts | {"projections": parts["projections"] + gates}

    def keys(self, model: ModelConfig, length: int) -> float:
        """Pooled rows of its compressed branch, tokens of the selected blocks, and its window's.

        Blocks are scored by the products of the compressed branch, which count once.
        """
        nsa = model.nsa
        whole, rest = divmod(length, nsa.block_size)
        # In block number c a query sees the c before it; its last token also its own.
        pooled = nsa.block_size * whole * (whole - 1) / 2 + whole * (rest + 1)
        # It selects min(c, num_blocks - 1) of them, and of its own has what has been.
        blocks = nsa.num_blocks - 1
        before = (whole - 1) * mean_of_min(whole - 1, blocks) if whole > 1 else 0
        selected = nsa.block_size * (nsa.block_size * before + rest * min(whole, blocks))
        own = (whole * nsa.block_size * (nsa.block_size + 1) + rest * (rest + 1)) / 2
        return (pooled + selected + own) / length + mean_of_min(length, nsa.window_size)

    def chooses_after(self, model: ModelConfig) -> int:
        return model.nsa.num_blocks * model.nsa.block_size

    def close_limits(self, model: ModelConfig) -> dict[str, dict[str, int]]:
        """One block beside those that are always selected."""
        return {"nsa": {"num_blocks": 4, "window_size": 24}}

    def window(self, model: ModelConfig) -> float:
        """The branch of that name, or a block's first token and the whole block before."""
        return max(model.nsa.window_size, model.nsa.block_size + 1)

    def activations(self, model: ModelConfig, batch: MicroBatch) -> Activations:
        """With w bytes an activation, queries of width Q, keys of width K and blocks of B tokens: q, and o of each
        branch and of all, 5 w Q, and this exchanged in its place; k and v, 2 w K, and pooled, 2 w K / B; gates, 3 w a
        query head; the logarithms of three denominators a query head, 12; and the selected blocks, 4 a KV head and
        block. Where ranks share a KV head, the others' queries, w Q as they come and w Q by heads, are gone before
        there is any o, which takes more.

        Backward, when the o of all is gone: gradients of q and o, w Q more, of k and v, 2 w K, and of gates, 3 w a
        query head; six scalars a query head, 24; selections by block, 8 a KV head and block; and sums of k's and v's
        gradients in fp32, 8 K a row: for each block and every ITEM selections of others, and for means by part of a
        document. Of shorter documents in the batch these sums are fewer.
        """
        from megahybrid_kernels.native_sparse_attention.triton_pairs import ITEM, PART, PARTS

        nsa, width = model.nsa, batch.width
        (queries, keys), heads = widths(nsa, batch), nsa.num_heads / batch.ranks
        selected = 4 * nsa.num_blocks * keys / nsa.head_dim
        saved = width * (5 * queries + 2 * keys * (1 + 1 / nsa.block_size)) + BRANCHES * (width + 4) * heads + selected
        sums = 1 + nsa.block_size * (nsa.num_blocks - 2) / ITEM + min(PARTS, -(-batch.length // PART)) / nsa.block_size
        backward = width * (queries + 2 * keys) + BRANCHES * (width + 8) * heads + 2 * selected + 8 * keys * sums
        return Activations(saved + unnormalised(nsa, batch), backward, selected)

    def judged(self, model: ModelConfig, ranks: int) -> list[Shape]:
        from megahybrid_kernels.judging import shapes

        nsa = model.nsa
        heads, groups, head_dim = rank_heads(nsa, ranks)
        op = shapes.NativeSparseAttention(heads, head_dim, groups, nsa.block_size, nsa.num_blocks, nsa.window_size)
        return [op, *judged_heads(nsa, ranks)]

    def module(self) -> type[Mixer]:
        from megahybrid.mixers.nsa.module import NSAAttention

        return NSAAttention

    def exported(self) -> type:
        from megahybrid.mixers.nsa.hf import NSAAttention

        return NSAAttention
