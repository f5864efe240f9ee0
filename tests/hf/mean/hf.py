"""The gated mean of all tokens so far."""

import torch
from torch import nn

from megahybrid.hf.layers_megahybrid import Mixer, at_least_fp32, linear


class CausalMean(Mixer):
    """Configuration: `gdn`, of which the width. State: `sum` `[B, width]`."""

    keep_in_fp32 = ("gain",)

    def __init__(self, config):
        super().__init__()
        width = config.gdn["num_heads"] * config.gdn["head_dim"]
        self.v_proj, self.g_proj = linear(config.hidden_size, width), linear(config.hidden_size, width)
        self.gain = nn.Parameter(torch.empty(width))
        self.o_proj = linear(width, config.hidden_size)

    def reset_parameters(self):
        self.gain.uniform_(1, 2)

    def empty_state(self, x):
        return {"sum": at_least_fp32(x).new_zeros(len(x), len(self.gain))}

    def forward(self, x, positions, state):
        sums = at_least_fp32(self.v_proj(x)).masked_fill((positions < 0)[..., None], 0).cumsum(1)
        sums = sums + state["sum"][:, None]
        mean = sums / (positions[..., None] + 1).clamp_min(1)
        return self.o_proj((mean * torch.sigmoid(self.g_proj(x)) * self.gain).to(x.dtype)), {"sum": sums[:, -1]}
