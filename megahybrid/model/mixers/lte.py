"""Sliding window attention with learnable token eviction (He & Garner, arXiv 2510.20787)."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megahybrid.model.context import Aux, Context
from megahybrid.model.mixers.attention import AttentionProjections
from megahybrid.model.settings import Settings
from megahybrid.parallel.parameters import constant, kaiming_normal, parameter, uniform
from megahybrid_kernels.counter_dropout import fold
from megahybrid_kernels.lte_attention import LTECache, lte_attention, lte_attention_with_cache
from megahybrid_kernels.retention_router import (
    Dropout,
    RouterParameters,
    RouterState,
    margin,
    retention_logits,
    retention_logits_streamed,
)


class LTEState(NamedTuple):
    """What an LTE layer remembers of each sequence: window ring and eviction buffer, and the router's last rows."""

    cache: LTECache
    router: RouterState


class Router(nn.Module):
    """The parameters of the retention router: one stack of three convolutions and a projection a key-value head."""

    def __init__(self, settings: Settings):
        super().__init__()
        heads, taps = settings.kv_heads, settings.model.lte.conv_size
        channels = [2 * settings.model.attention.head_dim >> halvings for halvings in range(4)]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan, out in itertools.pairwise(channels):
            bound = (fan * taps) ** -0.5
            self.weights.append(parameter(heads * out, fan, taps, axis=0, initializer=kaiming_normal(fan * taps)))
            self.biases.append(parameter(heads * out, axis=0, initializer=uniform(-bound, bound), weight_decay=False))
        last = channels[-1]
        self.projection = parameter(heads, last, axis=0, initializer=kaiming_normal(last))
        # Positive: at first most tokens are kept, and the L1 term prunes.
        self.projection_bias = parameter(heads, axis=0, initializer=constant(0.5), weight_decay=False)

    def parameters_for_op(self) -> RouterParameters:
        """The op's view of the parameters."""
        return RouterParameters(tuple(self.weights), tuple(self.biases), self.projection, self.projection_bias)


class LTEAttention(AttentionProjections):
    """Attention to a window, the sinks, and older tokens whose retention score is positive.

    `l1_lambda`, fp32 `[kv heads of this rank]`, weighs the L1 term; the controller sets it between steps.
    """

    def __init__(self, settings: Settings, layer: int):
        super().__init__(settings, layer)
        self.layer, self.lte = layer, settings.model.lte
        self.router = Router(settings)
        self.heads = self.router.projection.shape[0]
        self.margin = margin(self.lte.conv_size, self.lte.conv_dilation)
        self.l1_lambda = torch.zeros(self.heads)

    def forward(self, x: Tensor, context: Context, state: LTEState | None = None):
        """`[tokens, 1, hidden]` → (the same, by-products in training, the next state)."""
        q, k, v = self.project(x)
        if state is not None:
            return self._continue(q, k, v, context, state)
        lte, sequences = self.lte, context.sequences
        logits = retention_logits(
            k, v, self.router.parameters_for_op(), sequences, self._dropout(context), lte.conv_dilation
        )
        scores = torch.sigmoid(logits) - 0.5
        cap = None if context.training and not lte.train_cap else lte.buffer_size
        q, k = self.rotate(q, context), self.rotate(k, context)
        o = lte_attention(q, k, v, scores, sequences, lte.window_size, lte.sink_size, cap)
        return self.output(o), self._aux(scores, context) if context.training else None, None

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, context: Context, state: LTEState):
        lte, sequences = self.lte, context.sequences
        logits, router = retention_logits_streamed(
            k, v, self.router.parameters_for_op(), sequences, state.router, lte.conv_dilation
        )
        scores = torch.sigmoid(logits) - 0.5
        q, k = self.rotate(q, context), self.rotate(k, context)
        o, cache = lte_attention_with_cache(
            q, k, v, scores, state.cache, sequences, lte.window_size, lte.sink_size, lte.buffer_size, self.margin
        )
        return self.output(o), None, LTEState(cache, router)

    def _dropout(self, context: Context) -> Dropout | None:
        if not context.training or self.lte.dropout == 0:
            return None
        first = parallel_state.get_tensor_model_parallel_rank() * self.heads * 2 * self.head_dim
        return Dropout(self.lte.dropout, fold(context.dropout_keys, self.layer), first)

    def _aux(self, scores: Tensor, context: Context) -> Aux:
        """L1 term and kept counts, over positions whose right context is whole.

        The L1 sum is divided by a number fixed by shapes (tokens times scores a token), so that it does not depend on
        how documents fall into micro-batches.
        """
        whole = (context.sequences.remaining >= self.margin).unsqueeze(-1)
        excess = torch.relu(scores).masked_fill(~whole, 0).sum(0)
        loss = (self.l1_lambda.to(scores) * excess).sum() / (len(scores) * self.settings.scores_per_token)
        return Aux(loss, ((scores > 0) & whole).sum(0))

    def initial_state(self, sequences: int) -> LTEState:
        """The state before the first token of `sequences` sequences."""
        like, lte = self.k_proj.weight, self.lte
        cache = LTECache.empty(
            *(sequences, self.heads, self.head_dim, lte.window_size, lte.buffer_size),
            dtype=like.dtype,
            device=like.device,
        )
        return LTEState(cache, RouterState.empty(sequences, self.router.parameters_for_op(), lte.conv_dilation))
