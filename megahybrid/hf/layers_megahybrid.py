"""Layers of MegaHybrid language models.

Shapes: B sequences, T new tokens, H heads, D channels a head. Sequences may be padded on the left. Padding has position
-1, and leaves every state as it was. A mixer is called with x `[B, T, hidden]`, positions int64 `[B, T]` and its state,
a dictionary of tensors `[B, ...]`, and returns its output and its next state.
"""

import torch
import torch.nn.functional as F
from torch import nn

try:
    from megahybrid_kernels import Sequences
    from megahybrid_kernels.gated_delta_rule import gated_delta_rule as packed_gated_delta_rule
except ImportError:
    Sequences = packed_gated_delta_rule = None

CHUNK = 64
QUERY_BLOCK = 256


def at_least_fp32(x):
    """`x` in float32, or as it is when it already is float32 or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return scaled_to_unit(x, self.weight, self.eps).to(x.dtype)


def scaled_to_unit(x, weight, eps):
    """x divided by its root mean square over the last dimension, times `weight`; in at least float32."""
    x = at_least_fp32(x)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)


def linear(in_features, out_features):
    return nn.Linear(in_features, out_features, bias=False)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        gate, up = at_least_fp32(self.gate_proj(x)), at_least_fp32(self.up_proj(x))
        return self.down_proj((F.silu(gate) * up).to(x.dtype))


# --- G: Gated DeltaNet (Yang et al., arXiv 2412.06464) ---


class GatedDeltaNet(nn.Module):
    """State: `recurrent` `[B, H, Dk, Dv]`, and the short convolutions' last inputs `q, k, v` `[B, taps - 1, H D]`."""

    def __init__(self, config):
        super().__init__()
        sizes, hidden = config.gdn, config.hidden_size
        self.heads, self.key_dim, self.value_dim = sizes["num_heads"], sizes["head_dim"], sizes["value_head_dim"]
        self.taps, self.eps = sizes["conv_size"], config.norm_eps
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        self.q_proj, self.k_proj = linear(hidden, keys), linear(hidden, keys)
        self.v_proj, self.g_proj = linear(hidden, values), linear(hidden, values)
        self.a_proj, self.b_proj = linear(hidden, self.heads), linear(hidden, self.heads)
        self.q_conv, self.k_conv, self.v_conv = (
            nn.Parameter(torch.empty(size, self.taps)) for size in (keys, keys, values)
        )
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(self.heads)), nn.Parameter(torch.empty(self.heads))
        self.norm = nn.Parameter(torch.ones(self.value_dim))
        self.o_proj = linear(values, hidden)

    def empty_state(self, x):
        zeros, rows = at_least_fp32(x).new_zeros, (len(x), self.taps - 1)
        return {
            "recurrent": zeros(len(x), self.heads, self.key_dim, self.value_dim),
            "q": x.new_zeros(*rows, self.heads * self.key_dim),
            "k": x.new_zeros(*rows, self.heads * self.key_dim),
            "v": x.new_zeros(*rows, self.heads * self.value_dim),
        }

    def forward(self, x, positions, state):
        padding, after = (positions < 0)[..., None], {}
        parts = []
        for name, weight in (("q", self.q_conv), ("k", self.k_conv), ("v", self.v_conv)):
            projected = getattr(self, f"{name}_proj")(x).masked_fill(padding, 0)
            part, after[name] = short_convolution(projected, weight, state[name])
            parts.append(part.unflatten(-1, (self.heads, -1)))
        # Padding decays nothing and writes nothing.
        a, b = (layer(x).masked_fill(padding, -torch.inf) for layer in (self.a_proj, self.b_proj))
        o, after["recurrent"] = gated_delta_rule(*parts, a, b, self.A_log, self.dt_bias, state["recurrent"])
        gate = at_least_fp32(self.g_proj(x)).unflatten(-1, (self.heads, -1))
        o = scaled_to_unit(o, self.norm, self.eps) * F.silu(gate)
        return self.o_proj(o.to(x.dtype).flatten(-2)), after


def short_convolution(x, weight, past):
    """Causal depthwise convolution, then SiLU: x `[B, T, C]`, weight `[C, taps]`, past `[B, taps - 1, C]` → (y, the
    next past)."""
    rows = torch.cat([past.to(x.dtype), x], 1)
    y = F.conv1d(at_least_fp32(rows).mT, weight.to(at_least_fp32(rows).dtype)[:, None], groups=len(weight)).mT
    return F.silu(y).to(x.dtype), rows[:, rows.shape[1] - past.shape[1] :]


def gated_delta_rule(q, k, v, a, b, A_log, dt_bias, state):
    """Read and write a matrix-valued memory S token by token:

        alpha = exp(-exp(A_log) softplus(a + dt_bias)),  beta = sigmoid(b)
        S ← alpha (I - beta k kᵀ) S + beta k vᵀ,  o = Sᵀ q        (equation 10)

    q, k, v `[B, T, H, D]`, a, b `[B, T, H]`, A_log, dt_bias `[H]`, state `[B, H, Dk, Dv]` → (o `[B, T, H, Dv]`, state).
    """
    if packed_gated_delta_rule is not None:
        sequences = Sequences.of([q.shape[1]] * len(q), q.device)
        packed = (x.flatten(0, 1) for x in (q, k, v, a, b))
        o, state = packed_gated_delta_rule(*packed, A_log, dt_bias, sequences, state)
        return o.unflatten(0, q.shape[:2]), state
    return chunked_gated_delta_rule(q, k, v, a, b, A_log, dt_bias, state)


def chunked_gated_delta_rule(q, k, v, a, b, A_log, dt_bias, state):
    """`gated_delta_rule` chunk by chunk (section 3.3).

    With G_i the sum of the chunk's log-decays up to token i, its writes u solve a unit lower triangular system:
        u_i + beta_i sum_{j<i} exp(G_i - G_j) (k_i . k_j) u_j = beta_i (v_i - exp(G_i) Sᵀ k_i)
        o_i = exp(G_i) Sᵀ q_i + sum_{j<=i} exp(G_i - G_j) (q_i . k_j) u_j
        S ← exp(G_end) S + sum_j exp(G_end - G_j) k_j u_jᵀ
    """
    dtype, wanted = at_least_fp32(v).dtype, v.dtype
    q, k, v, a, b = (x.to(dtype).transpose(1, 2) for x in (q, k, v, a, b))  # heads first
    q = q * (q.square().sum(-1, keepdim=True) + 1e-6).rsqrt() * q.shape[-1] ** -0.5
    k = k * (k.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    beta = b.sigmoid()[..., None]
    g = -A_log.to(dtype).exp()[:, None] * F.softplus(a + dt_bias.to(dtype)[:, None])
    state, outputs = state.to(dtype), []
    for q_, k_, v_, beta_, g_ in zip(*(x.split(CHUNK, 2) for x in (q, k, v, beta, g)), strict=True):
        # In float64: beyond a strong decay, float32 differences of sums would lose the weak ones.
        G = g_.double().cumsum(-1)
        later = torch.ones(G.shape[-1], G.shape[-1], dtype=torch.bool, device=G.device).triu(1)
        decay = (G[..., :, None] - G[..., None, :]).to(dtype).masked_fill(later, -torch.inf).exp()
        since_start, until_end = G.to(dtype).exp()[..., None], (G[..., -1:] - G).to(dtype).exp()[..., None]
        right = beta_ * (v_ - since_start * (k_ @ state))
        u = torch.linalg.solve_triangular(decay * (k_ @ k_.mT) * beta_, right, upper=False, unitriangular=True)
        outputs.append(since_start * (q_ @ state) + (decay * (q_ @ k_.mT)) @ u)
        state = since_start[..., -1:, :] * state + (until_end * k_).mT @ u
    return torch.cat(outputs, 2).transpose(1, 2).to(wanted), state


# --- L, S, F: softmax attention ---


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
        exponents = torch.arange(first.shape[-1], dtype=first.dtype, device=x.device) / first.shape[-1]
        angles = positions[:, None, :, None].to(first.dtype) * self.theta**-exponents
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


# --- L: learnable token eviction (He & Garner, arXiv 2510.20787) ---


class LTEAttention(Attention):
    """A query sees a window and, per KV head, a buffer of the older tokens with the highest positive scores.

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


MIXERS = {"G": GatedDeltaNet, "L": LTEAttention, "S": WindowAttention, "F": FullAttention}
