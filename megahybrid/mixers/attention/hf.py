"""Softmax attention of MegaHybrid language models: full and sliding window, and what other kinds share with them."""

from decimal import Decimal, localcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from megahybrid.hf.layers_megahybrid import (
    Mixer,
    at_least_fp32,
    in_own_precision,
    kernels,
    last,
    linear,
    project,
    rms_norm,
)

QUERY_BLOCK = 256
TWO_PI = Decimal("6.283185307179586476925286766559005768394338798750")
RADIANS = float(TWO_PI / 2**64)


@lru_cache
def turns(half, theta):
    """Rotary embedding's turns a position, theta^(-i / half) / (2 pi), in units of 2^-64: integers of 64 bits.

    Their products with positions wrap around, which loses whole turns alone: angles are exact at any position.
    """
    with localcontext() as context:
        context.prec = 50
        each = [Decimal(theta) ** (-Decimal(i) / half) / TWO_PI for i in range(half)]
        units = [int((one * 2**64).to_integral_value()) for one in each]
    return tuple((one + 2**63) % 2**64 - 2**63 for one in units)


@lru_cache
def on_device(turns, device):
    """int64 `[half]`. Made at first use, not a buffer, which `from_pretrained` would leave without values or cast."""
    return torch.tensor(turns, device=device)


class Attention(Mixer):
    """The projections, and keys and values in columns, one a token, the past ones before the new ones.

    Configuration: a dictionary `section` with `num_heads`, `num_kv_heads`, `head_dim`, `rope_theta`,
    `qk_norm`.
    State: `k, v` `[B, H, columns, D]` and `positions` `[B, columns]`.
    """

    section = "attention"

    def __init__(self, config):
        super().__init__()
        sizes, hidden = getattr(config, self.section), config.hidden_size
        self.heads, self.kv_heads, self.head_dim = sizes["num_heads"], sizes["num_kv_heads"], sizes["head_dim"]
        self.theta = sizes["rope_theta"]
        self.turns = None if self.theta is None else turns(self.head_dim // 2, self.theta)
        self.q_proj = linear(hidden, self.heads * self.head_dim)
        self.k_proj = linear(hidden, self.kv_heads * self.head_dim)
        self.v_proj = linear(hidden, self.kv_heads * self.head_dim)
        self.o_proj = linear(self.heads * self.head_dim, hidden)
        self.qk_norm, self.eps = sizes["qk_norm"], config.norm_eps
        if self.qk_norm:
            self.q_norm, self.k_norm = (nn.Parameter(torch.ones(self.head_dim)) for _ in range(2))

    def reset_parameters(self):
        if self.qk_norm:
            self.q_norm.fill_(1)
            self.k_norm.fill_(1)

    def normalised(self, q, k):
        """Queries and keys `[…, D]` with their norms, if there are any."""
        return (rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)) if self.qk_norm else (q, k)

    def project(self, x):
        """q, k, v `[B, H, T, D]`, normalised, not yet rotated."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in layers)
        return *self.normalised(q, k), v

    def project_packed(self, x, *more):
        """q, k, v `[tokens, H, D]`, normalised, not yet rotated, and what `more` layers give."""
        q, k, v, *others = project(x, self.q_proj, self.k_proj, self.v_proj, *more)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        return *self.normalised(q, k), v, *others

    def rotate_packed(self, q, k, sequences):
        return (q, k) if self.theta is None else kernels.rotary_of_both(q, k, sequences.positions, self.theta)

    def begun(self, state, k, sequences):
        """The state, or that before the first token where it is empty."""
        return state if state or state is None else self.packed_state(sequences.count, k.dtype, k.device)

    @in_own_precision
    def attend_packed(self, q, k, v, sequences, cache, window=None):
        """(Output, cache): softmax attention to all earlier tokens or a window, of q, k, v not yet rotated."""
        inputs = *self.rotate_packed(q, k, sequences), v
        if cache is None:
            return kernels.attention(*inputs, sequences, window), None
        return kernels.attention_with_cache(*inputs, cache, sequences, window, in_place=True)

    def rotate(self, positions, *tensors):
        """Rotary embedding of each `[B, H, T, D]`, if there is one; halves are paired."""
        if self.theta is None:
            return tensors
        x = at_least_fp32(torch.cat(tensors, 1))
        first, second = x.chunk(2, -1)
        phases = positions[:, None, :, None] * on_device(self.turns, x.device)
        angles = phases.to(first.dtype) * RADIANS
        cos, sin = angles.cos(), angles.sin()
        x = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(tensors[0].dtype)
        return x.split([each.shape[1] for each in tensors], 1)

    def empty_columns(self, x, count):
        k = x.new_zeros(len(x), self.kv_heads, count, self.head_dim)
        return {"k": k, "v": k, "positions": torch.full((len(x), count), -1, device=x.device)}

    def output(self, o):
        return self.o_proj(o.transpose(1, 2).flatten(-2))


def attend(q, k, v, visible):
    """Attention of q `[B, heads, T, D]` to k, v `[B, H, n, D]`; visible bool `[B, H or 1, T, n]`."""
    groups = q.shape[1] // k.shape[1]
    rows = q.unflatten(1, (-1, groups)).flatten(2, 3)
    visible = visible[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)
    # A row of padding sees nothing, and would turn into NaN.
    visible = visible | ~visible.any(-1, keepdim=True)
    o = F.scaled_dot_product_attention(rows, k, v, attn_mask=visible)
    return o.unflatten(2, (groups, -1)).flatten(1, 2)


class WindowAttention(Attention):
    """Attention to the last `attention.window_size` tokens, the query's own included."""

    packs = True

    def __init__(self, config):
        super().__init__(config)
        self.window = config.attention["window_size"]

    def empty_state(self, x):
        return self.empty_columns(x, self.window)

    def packed_state(self, count, dtype, device):
        sizes = count, self.kv_heads, self.head_dim, self.window
        return vars(kernels.KeyValueCache.empty(*sizes, dtype=dtype, device=device))

    def forward(self, x, positions, state):
        if not isinstance(positions, torch.Tensor):
            q, k, v = self.project_packed(x)
            state = self.begun(state, k, positions)
            cache = None if state is None else kernels.KeyValueCache(**state)
            o, cache = self.attend_packed(q, k, v, positions, cache, self.window)
            return self.o_proj(o.flatten(-2)), None if cache is None else vars(cache)
        q, k, v = self.project(x)
        q, k = self.rotate(positions, q, k)
        columns = appended(state, k, v, positions)
        outputs = []
        for first in range(0, q.shape[2], QUERY_BLOCK):
            rows = q[:, :, first : first + QUERY_BLOCK]
            near = {name: x.narrow(-1 if name == "positions" else 2, first, self.window + rows.shape[2])
                    for name, x in columns.items()}  # fmt: skip
            visible = in_window(near["positions"], rows.shape[2])
            outputs.append(attend(rows, near["k"], near["v"], visible))
        return self.output(torch.cat(outputs, 2)), newest(columns, self.window)


class FullAttention(Attention):
    """Attention to all tokens, by a state that grows with them."""

    packs = True

    def empty_state(self, x):
        return self.empty_columns(x, 0)

    def packed_state(self, count, dtype, device):
        return {"cache": kernels.GrowingCache.empty(count, self.kv_heads, self.head_dim, dtype=dtype, device=device)}

    def forward(self, x, positions, state):
        if not isinstance(positions, torch.Tensor):
            q, k, v = self.project_packed(x)
            state = self.begun(state, k, positions)
            cache = None if state is None else state["cache"]
            o, cache = self.attend_packed(q, k, v, positions, cache)
            return self.o_proj(o.flatten(-2)), None if state is None else {"cache": cache}
        q, k, v = self.project(x)
        q, k = self.rotate(positions, q, k)
        columns = appended(state, k, v, positions)
        past, outputs = columns["k"].shape[2] - q.shape[2], []
        for first in range(0, q.shape[2], QUERY_BLOCK):
            rows = q[:, :, first : first + QUERY_BLOCK]
            end = past + first + rows.shape[2]
            known = columns["positions"][:, None, None, :end]
            row = torch.arange(past + first, end, device=q.device)
            visible = (known >= 0) & (torch.arange(end, device=q.device) <= row[:, None])
            outputs.append(attend(rows, columns["k"][:, :, :end], columns["v"][:, :, :end], visible))
        return self.output(torch.cat(outputs, 2)), columns


def appended(state, k, v, positions):
    """The state's columns with the new ones after them."""
    return {
        "k": torch.cat([state["k"], k], 2),
        "v": torch.cat([state["v"], v], 2),
        "positions": torch.cat([state["positions"], positions], 1),
    }


def newest(columns, count):
    """The last `count` columns."""
    return {name: last(x, x.dim() - 1 if x.dim() < 4 else 2, count) for name, x in columns.items()}


def in_window(positions, queries):
    """bool `[B, 1, queries, columns]`: the last `columns - queries` columns up to each query's own, which are the last
    ones of all; blank columns and padding excepted."""
    columns = torch.arange(positions.shape[1], device=positions.device)
    row = torch.arange(queries, device=positions.device)[:, None]
    near = (columns > row) & (columns <= row + positions.shape[1] - queries)
    return near & (positions >= 0)[:, None, None]
