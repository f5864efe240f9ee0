"""The gated mean of all tokens so far, in training."""

import torch

from megahybrid.model.mixer import Mixer
from megahybrid.parallel.layers import ColumnLinear, RowLinear, project
from megahybrid.parallel.parameters import constant, parameter


class CausalMean(Mixer):
    def __init__(self, settings, layer):
        super().__init__(settings, layer)
        hidden, width = settings.model.hidden_size, settings.model.gdn.num_heads * settings.model.gdn.head_dim
        self.v_proj = ColumnLinear(hidden, width, settings.projection)
        self.g_proj = ColumnLinear(hidden, width, settings.projection)
        self.gain = parameter(width, initializer=constant(1.0))
        self.o_proj = RowLinear(width, hidden, settings.output_projection, False)

    def forward(self, x, context, state=None):
        v, g = project(x, (self.v_proj, self.g_proj), False)
        sums = [piece.cumsum(0) for piece in v.split(context.sequences.lengths)]
        if state is not None:
            sums = [piece + past for piece, past in zip(sums, state, strict=True)]
        mean = torch.cat(sums) / (context.sequences.positions[:, None] + 1)
        y = self.o_proj(mean * torch.sigmoid(g) * self.gain)
        return y, None, None if state is None else torch.stack([piece[-1] for piece in sums])

    def initial_state(self, sequences):
        return self.gain.new_zeros(sequences, len(self.gain))
