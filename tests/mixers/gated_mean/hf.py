"""The gated causal mean as an exported model has it."""

import torch
from torch import nn

from megahybrid.hf.layers_megahybrid import Mixer, at_least_fp32, linear


class GatedMean(Mixer):
    """Configuration: `mean` with `num_heads`, `head_dim`. State: `total` `[B, H, D]`."""

    def __init__(self, config):
        super().__init__()
        self.shape = config.mean["num_heads"], config.mean["head_dim"]
        width = self.shape[0] * self.shape[1]
        self.v_proj, self.g_proj = linear(config.hidden_size, width), linear(config.hidden_size, width)
        self.bias = nn.Parameter(torch.empty(self.shape))
        self.o_proj = linear(width, config.hidden_size)

    def reset_parameters(self):
        self.bias.fill_(1)

    def empty_state(self, x):
        return {"total": at_least_fp32(x).new_zeros(len(x), *self.shape)}

    def forward(self, x, positions, state):
        v, g = (layer(x).unflatten(-1, self.shape) for layer in (self.v_proj, self.g_proj))
        seen = positions[..., None, None] + 1
        sums = state["total"][:, None] + at_least_fp32(v).masked_fill(seen == 0, 0).cumsum(1)
        o = torch.sigmoid(g + self.bias) * (sums / seen.clamp_min(1)).to(x.dtype)
        return self.o_proj(o.flatten(-2)), {"total": sums[:, -1]}
