"""Gated DeltaNet of MegaHybrid language models (Yang et al., arXiv 2412.06464)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from megahybrid.hf.layers_megahybrid import (
    Mixer,
    at_least_fp32,
    in_own_precision,
    kernels,
    linear,
    scaled_to_unit,
    takes_kernels,
)

CHUNK = 64


class GatedDeltaNet(Mixer):
    """A matrix-valued memory a head, behind short convolutions.

    Configuration: `gdn` with `num_heads`, `head_dim`, `value_head_dim`, `conv_size`.
    State: `recurrent` `[B, H, Dk, Dv]`, and the convolutions' last inputs `q, k, v` `[B, taps - 1, H D]`.
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
        return self.empty_state(torch.empty(count, 0, dtype=dtype, device=device))

    def forward(self, x, positions, state):
        if not isinstance(positions, torch.Tensor):
            return self.packed(x, positions, state)
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

    def packed(self, x, sequences, state):
        options = {"output_final_state": state is not None, "in_place": True}
        before, after, parts = state or {}, {}, []
        for name, weight in (("q", self.q_conv), ("k", self.k_conv), ("v", self.v_conv)):
            projected = getattr(self, f"{name}_proj")(x)
            part, after[name] = kernels.causal_conv1d(projected, weight, sequences, before.get(name), **options)
            parts.append(part.unflatten(-1, (self.heads, -1)))
        o, after["recurrent"] = kernels.gated_delta_rule(
            *parts,
            self.a_proj(x),
            self.b_proj(x),
            self.A_log,
            self.dt_bias,
            sequences,
            before.get("recurrent"),
            **options,
        )
        gate = self.g_proj(x).unflatten(-1, (self.heads, -1))
        o = kernels.gated_rms_norm(o, gate, self.norm, self.eps)
        return self.o_proj(o.flatten(-2)), None if state is None else after


@in_own_precision
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
    if takes_kernels(v):
        sequences = kernels.Sequences.of([q.shape[1]] * len(q), q.device)
        packed = (x.flatten(0, 1) for x in (q, k, v, a, b))
        o, state = kernels.gated_delta_rule(*packed, A_log, dt_bias, sequences, state, output_final_state=True)
        return o.unflatten(0, q.shape[:2]), state
    return chunked_gated_delta_rule(q, k, v, a, b, A_log, dt_bias, state)


@in_own_precision
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
