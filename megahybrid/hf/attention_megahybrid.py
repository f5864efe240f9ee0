"""Attention layers of MegaHybrid language models: full, sliding window, and learnable token eviction (He & Garner,
arXiv 2510.20787). Shapes and the way a mixer is called are those of layers_megahybrid."""

from decimal import Decimal, localcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from .layers_megahybrid import at_least_fp32, linear

QUERY_BLOCK = 256
TWO_PI = Decimal("6.283185307179586476925286766559005768394338798750")


@lru_cache
def frequencies(half, theta, device):
    """Rotary embedding's turns a position, theta^(-i / half) / (2 pi), in units of 2^-64: int64 `[half]`.

    Their products with positions wrap around, which loses whole turns alone: angles are exact at any position. Made at
    first use, not as a buffer, which `from_pretrained` would leave without values or cast.
    """
    with localcontext() as context:
        context.prec = 50
        turns = [Decimal(theta) ** (-Decimal(i) / half) / TWO_PI for i in range(half)]
        units = [int((each * 2**64).to_integral_value()) for each in turns]
    return torch.tensor([(each + 2**63) % 2**64 - 2**63 for each in units], device=device)


class Attention(nn.Module):
    """The projections of L, S and F, and what these layers share: keys and values in columns, one a token, the past
    ones before the new ones. State: `k, v` `[B, H, columns, D]` and `positions` `[B, columns]`."""

    def __init__(self, config):
        super().__init__()
        sizes, hidden = config.attention, config.hidden_size
        self.heads, self.kv_heads, self.head_dim = sizes["num_heads"], sizes["num_kv_heads"], sizes["head_dim"]
        self.theta = sizes["rope_theta"]
        self.q_proj = linear(hidden, self.heads * self.head_dim)
        self.k_proj = linear(hidden, self.kv_heads * self.head_dim)
        self.v_proj = linear(hidden, self.kv_heads * self.head_dim)
        self.o_proj = linear(self.heads * self.head_dim, hidden)

    def project(self, x):
        """q, k, v `[B, H, T, D]`, not yet rotated."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        return (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in layers)

    def rotate(self, x, positions):
        """Rotary embedding; halves are paired."""
        first, second = at_least_fp32(x).chunk(2, -1)
        phases = positions[:, None, :, None] * frequencies(first.shape[-1], self.theta, x.device)
        angles = phases.to(first.dtype) * float(TWO_PI / 2**64)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

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
    """S: attention to the last `window_size` tokens, the query's own included."""

    def __init__(self, config):
        super().__init__(config)
        self.window = config.attention["window_size"]

    def empty_state(self, x):
        return self.empty_columns(x, self.window)

    def forward(self, x, positions, state):
        q, k, v = self.project(x)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
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
    """F: attention to all tokens."""

    def empty_state(self, x):
        return self.empty_columns(x, 0)

    def forward(self, x, positions, state):
        q, k, v = self.project(x)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
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
    return {name: x.narrow(-1 if x.dim() < 4 else 2, x.shape[-1 if x.dim() < 4 else 2] - count, count)
            for name, x in columns.items()}  # fmt: skip


def in_window(positions, queries):
    """bool `[B, 1, queries, columns]`: the last `columns - queries` columns up to each query's own, which are the last
    ones of all; blank columns and padding excepted."""
    columns = torch.arange(positions.shape[1], device=positions.device)
    row = torch.arange(queries, device=positions.device)[:, None]
    near = (columns > row) & (columns <= row + positions.shape[1] - queries)
    return near & (positions >= 0)[:, None, None]


class LTEAttention(Attention):
    """L: a query sees a window and, per KV head, a buffer of the older tokens with the highest positive scores.

    State: the window's `k, v` `[B, H, w + 1, D]`, `positions` `[B, w + 1]` and `score` `[B, H, w + 1]`; the buffer's
    `buffer_k, buffer_v` `[B, H, b, D]`, `buffer_score, buffer_positions` `[B, H, b]`; the router's `rows0..2`.
    """

    def __init__(self, config):
        super().__init__(config)
        lte = config.lte
        self.columns, self.buffer, self.sinks = lte["window_size"] + 1, lte["buffer_size"], lte["sink_size"]
        self.router = Router(self.kv_heads, self.head_dim, lte["conv_size"], lte["conv_dilation"])

    def empty_state(self, x):
        window, buffer = self.empty_columns(x, self.columns), self.empty_columns(x, self.buffer)
        score = at_least_fp32(x).new_zeros
        return {
            **window,
            "score": score(len(x), self.kv_heads, self.columns),
            "buffer_k": buffer["k"],
            "buffer_v": buffer["v"],
            "buffer_score": score(len(x), self.kv_heads, self.buffer),
            "buffer_positions": buffer["positions"][:, None].expand(-1, self.kv_heads, -1),
            **self.router.empty_state(x),
        }

    def forward(self, x, positions, state):
        q, k, v = self.project(x)
        scores, after = self.router(k, v, positions, state)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        columns = appended(state, k, v, positions)
        columns["score"] = torch.cat([state["score"], torch.zeros_like(scores)], 2)
        # Scores come `margin` tokens late, and before their tokens leave the window.
        columns["score"] = columns["score"].slice_scatter(
            scores, 2, self.columns - self.router.margin, columns["score"].shape[2] - self.router.margin
        )
        buffer = {name: state[f"buffer_{name}"] for name in ("k", "v", "score", "positions")}
        outputs = []
        for first in range(0, q.shape[2], QUERY_BLOCK):
            rows = q[:, :, first : first + QUERY_BLOCK]
            o, buffer = self.block(rows, columns, buffer, first)
            outputs.append(o)
        after.update(newest(columns, self.columns))
        after.update({f"buffer_{name}": x for name, x in buffer.items()})
        return self.output(torch.cat(outputs, 2)), after

    def block(self, q, columns, buffer, first):
        """Queries `[B, heads, n, D]` from column `first` of the new ones on: (output, the buffer after them).

        Query i sees the w + 1 columns up to its own; the column before these arrives at the buffer with it.
        """
        count = q.shape[2]
        known = {name: x.narrow(2 if x.dim() == 4 else -1, first, self.columns + count) for name, x in columns.items()}
        arriving = {name: x.narrow(2 if x.dim() == 4 else -1, 0, count) for name, x in known.items()}
        arriving["positions"] = arriving["positions"][:, None].expand(-1, self.kv_heads, -1)
        candidates = {name: torch.cat([buffer[name], arriving[name]], 2) for name in buffer}
        held = self.held(candidates["score"], candidates["positions"], count)
        older, arrived = held.split([self.buffer, count], -1)
        near = in_window(known["positions"], count).expand(-1, self.kv_heads, -1, -1)
        visible = torch.cat([older, near[..., :count] | arrived, near[..., count:]], -1)
        k, v = (torch.cat([buffer[name], known[name]], 2) for name in ("k", "v"))
        kept = held[..., -1, :]
        best = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., : self.buffer]
        blank, after = ~kept.gather(2, best), {}
        for name, x in candidates.items():
            if x.dim() == 4:
                after[name] = x.gather(2, best[..., None].expand(-1, -1, -1, self.head_dim))
            else:
                after[name] = x.gather(2, best).masked_fill(blank, -1 if name == "positions" else 0)
        return attend(q, k, v, visible), after

    def held(self, score, positions, count):
        """bool `[B, H, count, b + count]`: whether the buffer holds a candidate when each of `count` queries looks.

        score, positions `[B, H, b + count]`: the buffer's candidates, then those that arrive, one with each query. One
        is held from its arrival until `b` that outrank it have arrived: sinks first, then the higher score, then the
        earlier position.
        """
        candidate = (positions >= 0) & ((score > 0) | (positions < self.sinks))
        rank = torch.where(positions < self.sinks, torch.inf, score).masked_fill(~candidate, -torch.inf)
        higher = rank[..., :, None] > rank[..., None, :]
        tied = (rank[..., :, None] == rank[..., None, :]) & (positions[..., :, None] < positions[..., None, :])
        outranks = higher | tied
        at_first = outranks[..., : self.buffer, :].sum(-2, keepdim=True, dtype=torch.int32)
        outranking = at_first + outranks[..., self.buffer :, :].cumsum(-2, dtype=torch.int32)
        arrival = torch.arange(-self.buffer, count, device=score.device)
        arrived = arrival <= torch.arange(count, device=score.device)[:, None]
        return candidate[..., None, :] & arrived & (outranking < self.buffer)


class Router(nn.Module):
    """Retention scores from three dilated convolutions over time and a projection, one network a KV head.

    State: the convolutions' last inputs `rows0..2` `[B, (taps - 1) dilation, H C]`. A score needs `margin` tokens on
    either side, and comes that many tokens late.
    """

    def __init__(self, heads, head_dim, taps, dilation):
        super().__init__()
        self.heads, self.dilation, self.reach = heads, dilation, (taps - 1) * dilation
        self.channels = [2 * head_dim >> halvings for halvings in range(4)]
        self.margin = 3 * self.reach // 2
        for number in range(3):
            fan_in, out = self.channels[number], self.heads * self.channels[number + 1]
            self.register_parameter(f"conv{number}_weight", nn.Parameter(torch.empty(out, fan_in, taps)))
            self.register_parameter(f"conv{number}_bias", nn.Parameter(torch.empty(out)))
        self.projection = nn.Parameter(torch.empty(heads, self.channels[-1]))
        self.projection_bias = nn.Parameter(torch.empty(heads))

    def empty_state(self, x):
        zeros = at_least_fp32(x).new_zeros
        return {f"rows{n}": zeros(len(x), self.reach, self.heads * self.channels[n]) for n in range(3)}

    def forward(self, k, v, positions, state):
        """k, v `[B, H, T, D]`, k not rotated → scores in (-1/2, 1/2) `[B, H, T]` of the tokens `margin` earlier."""
        after = {}
        x = at_least_fp32(torch.cat([k, v], -1)).transpose(1, 2).flatten(-2)
        for number in range(3):
            # Where there is no token of the sequence, the next layer must find zeros, as its padding would be.
            x = x.masked_fill((positions < 0)[..., None], 0)
            rows = torch.cat([state[f"rows{number}"], x], 1)
            after[f"rows{number}"] = rows[:, rows.shape[1] - self.reach :]
            weight, bias = (getattr(self, f"conv{number}_{name}").to(x.dtype) for name in ("weight", "bias"))
            x = F.silu(F.conv1d(rows.mT, weight, bias, dilation=self.dilation, groups=self.heads)).mT
            positions = positions - self.reach // 2
        x = x.unflatten(-1, (self.heads, -1))
        logits = (x * self.projection.to(x.dtype)).sum(-1) + self.projection_bias.to(x.dtype)
        return torch.sigmoid(logits).mT - 0.5, after
