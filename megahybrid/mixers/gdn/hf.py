"""Gated DeltaNet of MegaHybrid language models (Yang et al., arXiv 2412.06464)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from megahybrid.hf.layers_megahybrid import (
    Mixer,
    at_least_fp32,
    in_own_precision,
    joined,
    kept_beside,
    kernels,
    last,
    linear,
    project,
    scaled_to_unit,
    takes_kernels,
)

CHUNK = 64
CHUNKS = 32  # at once


class GatedDeltaNet(Mixer):
    """A matrix-valued memory a head, behind short convolutions.

    Configuration: `gdn` with `num_heads`, `head_dim`, `value_head_dim`, `conv_size`.
    State: `recurrent` `[B, H, Dk, Dv]`, and the convolutions' last inputs `q, k, v` `[B, taps - 1, H D]`; of the packed
    form these are one, `rows`.
    """

    packs = True
    keep_in_fp32 = ("A_log", "dt_bias")

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

    def reset_parameters(self):
        for weight in (self.q_conv, self.k_conv, self.v_conv):
            weight.uniform_(-(self.taps**-0.5), self.taps**-0.5)
        self.A_log.uniform_(1e-4, 16).log_()
        step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        step.add_(torch.log(-torch.expm1(-step)))
        self.norm.fill_(1)

    def empty_state(self, x):
        zeros, rows = at_least_fp32(x).new_zeros, (len(x), self.taps - 1)
        return {
            "recurrent": zeros(len(x), self.heads, self.key_dim, self.value_dim),
            "q": x.new_zeros(*rows, self.heads * self.key_dim),
            "k": x.new_zeros(*rows, self.heads * self.key_dim),
            "v": x.new_zeros(*rows, self.heads * self.value_dim),
        }

    def packed_state(self, count, dtype, device):
        state = self.empty_state(torch.empty(count, 0, dtype=dtype, device=device))
        return {"recurrent": state["recurrent"], "rows": torch.cat([state[name] for name in "qkv"], -1)}

    def forward(self, x, positions, state):
        if not isinstance(positions, torch.Tensor):
            return self.packed(x, positions, state)
        padding, names, convs = (positions < 0)[..., None], "qkv", (self.q_conv, self.k_conv, self.v_conv)
        # One convolution: where there are no kernels, decoding takes as long as its launches.
        projected = torch.cat([layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj)], -1)
        past = torch.cat([state[name] for name in names], -1)
        mixed, past = short_convolution(projected.masked_fill(padding, 0), torch.cat(convs), past)
        sizes = list(map(len, convs))
        after = dict(zip(names, past.split(sizes, -1), strict=True))
        parts = [part.unflatten(-1, (self.heads, -1)) for part in mixed.split(sizes, -1)]
        # Padding decays nothing and writes nothing.
        a, b = (layer(x).masked_fill(padding, -torch.inf) for layer in (self.a_proj, self.b_proj))
        o, after["recurrent"] = gated_delta_rule(*parts, a, b, self.A_log, self.dt_bias, state["recurrent"])
        gate = at_least_fp32(self.g_proj(x)).unflatten(-1, (self.heads, -1))
        o = scaled_to_unit(o, self.norm, self.eps) * F.silu(gate)
        return self.o_proj(o.to(x.dtype).flatten(-2)), after

    def packed(self, x, sequences, state):
        layers = self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.a_proj, self.b_proj
        o, after = self.mixed(*project(x, *layers), sequences, state)
        return self.o_proj(o.flatten(-2)), after

    @in_own_precision
    def mixed(self, q, k, v, gate, a, b, sequences, state):
        options = {"output_final_state": state is not None, "in_place": True}
        inputs, convs, rows = (q, k, v), (self.q_conv, self.k_conv, self.v_conv), None
        if state is None:
            parts = [
                kernels.causal_conv1d(x, conv, sequences, **options)[0] for x, conv in zip(inputs, convs, strict=True)
            ]
        else:
            weight = None if self.training else kept_beside(self, convs)[0]
            weight = joined(convs, 0) if weight is None else weight
            x = joined(inputs, 1)
            x, rows = kernels.causal_conv1d(x, weight, sequences, state.get("rows"), **options)
            parts = x.split(list(map(len, convs)), 1)
        parts = [x.unflatten(-1, (self.heads, -1)) for x in parts]
        gates, memory = (a, b, self.A_log, self.dt_bias), (state or {}).get("recurrent")
        o, memory = kernels.gated_delta_rule(*parts, *gates, sequences, memory, **options)
        o = kernels.gated_rms_norm(o, gate.unflatten(-1, (self.heads, -1)), self.norm, self.eps)
        return o, None if state is None else {"recurrent": memory, "rows": rows}


@in_own_precision
def short_convolution(x, weight, past):
    """Causal depthwise convolution, then SiLU: x `[B, T, C]`, weight `[C, taps]`, past `[B, taps - 1, C]` → (y, the
    next past)."""
    rows = torch.cat([past.to(x.dtype), x], 1)
    y = F.conv1d(at_least_fp32(rows).mT, weight.to(at_least_fp32(rows).dtype)[:, None], groups=len(weight)).mT
    return F.silu(y).to(x.dtype), last(rows, 1, past.shape[1])


def gated_delta_rule(q, k, v, a, b, A_log, dt_bias, state):
    """Read and write a matrix-valued memory S token by token:

        alpha = exp(-exp(A_log) softplus(a + dt_bias)),  beta = sigmoid(b)
        S ← alpha (I - beta k kᵀ) S + beta k vᵀ,  o = Sᵀ q        (equation 10)

    q, k, v `[B, T, H, D]`, a, b `[B, T, H]`, A_log, dt_bias `[H]`, state `[B, H, Dk, Dv]` → (o `[B, T, H, Dv]`, state).
    """
    if takes_kernels(v):
        sequences = kernels.Sequences.of([q.shape[1]] * len(q), q.device)
        packed = (x.flatten(0, 1) for x in (q, k, v, a, b))
        o, state = kernels.gated_delta_rule(*packed, A_log, dt_bias, sequences, state, output_final_state=True)
        return o.unflatten(0, q.shape[:2]), state
    rule = one_token if q.shape[1] == 1 else chunked_gated_delta_rule
    return rule(q, k, v, a, b, A_log, dt_bias, state)


@in_own_precision
def one_token(q, k, v, a, b, A_log, dt_bias, state):
    """`gated_delta_rule` as it stands, of one token."""
    dtype, wanted, heads = at_least_fp32(v).dtype, v.dtype, v.shape[2]
    q, k = unit(torch.cat([q, k], 2).to(dtype)).split(heads, 2)
    alpha = (A_log.to(dtype).exp() * -F.softplus(a.to(dtype) + dt_bias.to(dtype))).exp()
    q, k, v, alpha, beta = (x.transpose(1, 2) for x in (q, k, v, alpha[..., None], b.to(dtype).sigmoid()[..., None]))
    state = state.to(dtype) * alpha
    state = state + k.mT @ (beta * (v - k @ state))
    return (q * q.shape[-1] ** -0.5 @ state).transpose(1, 2).to(wanted), state


def unit(x):
    """x `[..., size]` over its norm, whose square is 1e-6 more, so that zeros stay zeros."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


@in_own_precision
def chunked_gated_delta_rule(q, k, v, a, b, A_log, dt_bias, state):
    """`gated_delta_rule` chunk by chunk (section 3.3).

    With G_i the sum of the chunk's log-decays up to token i, its writes u solve a unit lower triangular system:
        u_i + beta_i sum_{j<i} exp(G_i - G_j) (k_i . k_j) u_j = beta_i (v_i - exp(G_i) Sᵀ k_i)
        o_i = exp(G_i) Sᵀ q_i + sum_{j<=i} exp(G_i - G_j) (q_i . k_j) u_j
        S ← exp(G_end) S + sum_j exp(G_end - G_j) k_j u_jᵀ
    It is solved for v and k, of many chunks at once, before S is known.
    """
    dtype, wanted = at_least_fp32(v).dtype, v.dtype
    q, k, v, a, b = (x.to(dtype).transpose(1, 2) for x in (q, k, v, a, b))  # heads first
    q, k = unit(q) * q.shape[-1] ** -0.5, unit(k)
    beta = b.sigmoid()[..., None]
    g = -A_log.to(dtype).exp()[:, None] * F.softplus(a + dt_bias.to(dtype)[:, None])
    state, outputs = state.to(dtype), []
    for piece in zip(*(x.split(CHUNKS * CHUNK, 2) for x in (q, k, v, beta, g[..., None])), strict=True):
        q_, k_, v_, beta_, g_ = (in_chunks(x, min(CHUNK, x.shape[2])) for x in piece)
        # In float64: beyond a strong decay, float32 differences of sums would lose the weak ones.
        G = g_[..., 0].double().cumsum(-1)
        later = torch.ones(G.shape[-1], G.shape[-1], dtype=torch.bool, device=G.device).triu(1)
        decay = (G[..., :, None] - G[..., None, :]).to(dtype).masked_fill(later, -torch.inf).exp()
        since_start, until_end = G.to(dtype).exp()[..., None], (G[..., -1:] - G).to(dtype).exp()[..., None]
        right = torch.cat([beta_ * v_, beta_ * since_start * k_], -1)
        solved = torch.linalg.solve_triangular(decay * (k_ @ k_.mT) * beta_, right, upper=False, unitriangular=True)
        seen, among, left = since_start * q_, decay * (q_ @ k_.mT), (until_end * k_).mT
        written, erased = solved.split([v_.shape[-1], k_.shape[-1]], -1)
        chunks = zip(
            *(x.unbind(2) for x in (written, erased, seen, among, left, since_start[..., -1:, :])), strict=True
        )
        found = []
        for written_, erased_, seen_, among_, left_, kept in chunks:
            u = written_ - erased_ @ state
            found.append(seen_ @ state + among_ @ u)
            state = kept * state + left_ @ u
        outputs.append(torch.cat(found, 2)[:, :, : piece[0].shape[2]])
    return torch.cat(outputs, 2).transpose(1, 2).to(wanted), state


def in_chunks(x, size):
    """`[B, H, T, C]` → `[B, H, chunks, size, C]`; what is 0 at the end writes and decays nothing."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))
