"""The module of native sparse attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megahybrid.config.schema import ModelConfig
from megahybrid.mixers.attention.module import AttentionProjections, every_position
from megahybrid.mixers.nsa import BRANCHES, NSAKind
from megahybrid.mixers.nsa.sharing import all_queries, select_together
from megahybrid.model.context import Aux, Context
from megahybrid.model.mixer import Fallback
from megahybrid.model.settings import Settings
from megahybrid.parallel import groups
from megahybrid.parallel.layers import ColumnLinear
from megahybrid_kernels.native_sparse_attention import (
    NSACache,
    native_sparse_attention,
    native_sparse_attention_with_cache,
    unsupported,
)


class NSAAttention(AttentionProjections):
    """Attention to the mean of every block, to all of a few blocks, and to a window, weighed by each head's gates.

    The query heads of a KV head select the same blocks, whose choice has no gradient.
    """

    section = NSAKind.section

    def __init__(self, settings: Settings, layer: int):
        super().__init__(settings, layer)
        nsa = settings.model.nsa
        self.limits = nsa.block_size, nsa.num_blocks, nsa.window_size
        self.g_proj = ColumnLinear(settings.model.hidden_size, BRANCHES * nsa.num_heads, settings.projection)
        self.sharers = max(1, groups.head_parallel()[1] // nsa.num_kv_heads)

    def forward(self, x: Tensor, context: Context, state: NSACache | None = None):
        q, k, v, gates = self.project(x, self.g_proj)
        q, k = self.rotate(q, k, context.sequences)
        inputs = q, k, v, gates.sigmoid()
        state = self.begun(state, context)
        if state is not None:
            queries = all_queries(q, self.sharers) if self.sharers > 1 else None
            o, state = native_sparse_attention_with_cache(
                *inputs, state, context.sequences, *self.limits, in_place=context.in_place, queries=queries
            )
            return self.output(o), None, state
        taken = context.decision.taken if context.decision else None
        if taken is None and self.sharers > 1:
            taken = select_together(q, k, context.sequences, *self.limits[:2], self.sharers)
        o, selection = native_sparse_attention(*inputs, context.sequences, *self.limits, taken)
        if context.decision is not None:
            context.decision.taken = selection
        return self.output(o), self._seen(k, selection, context), None

    def _seen(self, k: Tensor, selection: Tensor, context: Context) -> Aux | None:
        """Whole keys: of a block that is only pooled none is seen."""
        if context.watch is None:
            return None
        queries, keys = context.watch
        block_size, _, window_size = self.limits
        blocks = context.sequences.positions[keys] // block_size
        return self.seen(k, context, window_size, (selection[queries] == blocks[:, None, None]).any(-1))

    def initial_state(self, sequences: int) -> NSACache:
        like, heads = self.k_proj.weight, self.k_proj.weight.shape[0] // self.head_dim
        return NSACache.empty(sequences, heads, self.head_dim, self.limits[0], dtype=like.dtype, device=like.device)

    def held(self, state: NSACache) -> Tensor:
        return every_position(state).expand(-1, self.counted_heads, -1)

    @classmethod
    def fallbacks(cls, model: ModelConfig, dtype: torch.dtype) -> Iterator[Fallback]:
        if reason := unsupported(dtype, model.nsa.head_dim, model.nsa.block_size):
            yield Fallback("native_sparse_attention", reason, "model.nsa.head_dim")
