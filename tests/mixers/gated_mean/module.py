"""The module of the gated causal mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megahybrid.model.context import Context
from megahybrid.model.mixer import Mixer
from megahybrid.model.settings import Settings
from megahybrid.parallel.layers import ColumnLinear, RowLinear, project
from megahybrid.parallel.parameters import constant, parameter


class MeanState(NamedTuple):
    """Sums of the values so far, `[sequences, heads, head_dim]`, at least fp32."""

    total: Tensor


class GatedMean(Mixer):
    """o_t = sigmoid(g_t + bias) · mean of v_1 … v_t in the token's document; heads split over tensor parallel ranks."""

    def __init__(self, settings: Settings, layer: int):
        super().__init__(settings, layer)
        hidden, mean = settings.model.hidden_size, settings.model.mean
        self.head_dim = mean.head_dim
        self.v_proj = ColumnLinear(hidden, mean.num_heads * mean.head_dim, settings.projection)
        self.g_proj = ColumnLinear(hidden, mean.num_heads * mean.head_dim, settings.projection)
        self.bias = parameter(mean.num_heads, mean.head_dim, axis=0, initializer=constant(1.0), weight_decay=False)
        self.o_proj = RowLinear(
            mean.num_heads * mean.head_dim, hidden, settings.output_projection, settings.sequence_parallel
        )

    def forward(self, x: Tensor, context: Context, state: MeanState | None = None):
        projected = project(x, (self.v_proj, self.g_proj), self.settings.sequence_parallel)
        v, g = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        values = v.to(torch.promote_types(v.dtype, torch.float32)).split(list(context.sequences.lengths))
        sums = [each.cumsum(0) for each in values]
        if state is not None:
            sums = [each + before for each, before in zip(sums, state.total, strict=True)]
            state = MeanState(torch.stack([each[-1] for each in sums]))
        mean = torch.cat(sums) / (context.sequences.positions + 1)[:, None, None]
        o = torch.sigmoid(g + self.bias) * mean.to(v.dtype)
        return self.o_proj(o.flatten(-2)), None, state

    def initial_state(self, sequences: int) -> MeanState:
        dtype = torch.promote_types(self.bias.dtype, torch.float32)
        return MeanState(self.bias.new_zeros(sequences, *self.bias.shape, dtype=dtype))
