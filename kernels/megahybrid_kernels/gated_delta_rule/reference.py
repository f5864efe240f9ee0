"""The gated delta rule in PyTorch: all chunks at once where no state is needed, then a scan over chunk indices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid_kernels.gated_delta_rule.border import Border
from megahybrid_kernels.precision import at_least_fp32
from megahybrid_kernels.sequences import Sequences

# Half of what a GPU likes: on CPUs a chunk's quadratic part costs more than a longer scan saves.
CHUNK = 32


@dataclass(frozen=True)
class ChunkPlan:
    """How a packing is cut into chunks of equal size, ordered by chunk index and, within one, by sequence.

    Sequences are taken longest first, so that those with a chunk of a given index are a prefix of those with the one
    before. Places that are left over in a sequence's last chunk repeat token 0 and have to be made to change nothing.

    Attributes:
        running: for each chunk index, how many sequences have such a chunk.
        tokens: int64 `[chunks, 1, size]`, the token at each place.
        filler: bool `[chunks, 1, size]`, the places left over.
        places: int64 `[tokens, 2]`, each token's chunk and its place there.
        order: int64 `[sequences]`, sequence numbers, longest first.
        rank: int64 `[sequences]`, the inverse of `order`.
    """

    running: tuple[int, ...]
    tokens: Tensor
    filler: Tensor
    places: Tensor
    order: Tensor
    rank: Tensor


@lru_cache(maxsize=8)
def plan_chunks(lengths: tuple[int, ...], device: torch.device) -> ChunkPlan:
    """The plan for sequences of these lengths, made on the host once for all layers that share a packing."""
    # Out of inference mode, because a plan first made during evaluation is saved for backward by later training.
    with torch.inference_mode(False):
        size = min(CHUNK, max(lengths))
        length = torch.tensor(lengths)
        chunks = (length + size - 1) // size
        order = torch.argsort(chunks, descending=True, stable=True)
        rank = torch.argsort(order)
        running = (chunks > torch.arange(int(chunks.max()))[:, None]).sum(1)
        sequence = torch.repeat_interleave(length)
        offset = torch.arange(len(sequence)) - (length.cumsum(0) - length)[sequence]
        chunk = (running.cumsum(0) - running)[offset // size] + rank[sequence]
        places = torch.stack([chunk, offset % size], 1)
        tokens = torch.full((int(chunks.sum()), 1, size), -1)
        tokens[chunk, 0, offset % size] = torch.arange(len(sequence))
        tensors = (tokens.clamp(min=0), tokens < 0, places, order, rank)
        return ChunkPlan(tuple(running.tolist()), *(x.to(device, non_blocking=True) for x in tensors))


def _to_chunks(x: Tensor, plan: ChunkPlan) -> Tensor:
    """`[tokens, heads, ...]` to `[chunks, heads, size, ...]`."""
    heads = x.shape[1]
    rows = plan.tokens * heads + torch.arange(heads, device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _to_tokens(x: Tensor, plan: ChunkPlan) -> Tensor:
    """`[chunks, heads, size, D]` to `[tokens, heads, D]`."""
    heads, size = x.shape[1:3]
    chunk, place = plan.places[:, None].unbind(-1)
    rows = (chunk * heads + torch.arange(heads, device=x.device)) * size + place
    return x.flatten(0, 2).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _inverse_norm(x: Tensor) -> Tensor:
    return (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def _solve_unit_lower(lower: Tensor, right: Tensor) -> Tensor:
    """`(I + strictly lower part of lower)^-1 right`, transposed since LAPACK's column-major order saves copies so."""
    return torch.linalg.solve_triangular(lower.mT, right.mT, upper=True, left=False, unitriangular=True).mT


def _scan(
    per_chunk: tuple[Tensor, ...], state: Tensor, running: tuple[int, ...], output_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    """o and the states after each sequence's last chunk, from the system, attention, reads and writes of all chunks.

    Args:
        per_chunk: `lower, attention [chunks, heads, size, size]`, `q, w, v, k [chunks, heads, size, D]` and
            `decay [chunks, heads, 1, 1]` of the equations u = (I + lower)^-1 (v + w S), o = attention u + q S,
            S' = decay S + k^T u.
        state: `[sequences, heads, Dk, Dv]`, longest sequence first, as all that is returned.
    """
    heads = state.shape[1]
    counts = [sequences * heads for sequences in running]
    # `split`, not slices: the backward of a slice fills a gradient of the whole tensor for every chunk index.
    steps = zip(*(x.flatten(0, 1).split(counts) for x in per_chunk), strict=True)
    state, outputs, ended = state.flatten(0, 1), [], []
    for number, (lower, attention, q, w, v, k, decay) in enumerate(steps, start=1):
        state, done = state.split((len(v), len(state) - len(v)))
        ended.append(done)
        u = _solve_unit_lower(lower, torch.baddbmm(v, w, state))
        outputs.append(torch.baddbmm(attention @ u, q, state))
        if output_final_state or number < len(running):
            state = torch.baddbmm(decay * state, k.mT, u)
    o = torch.cat(outputs).unflatten(0, (-1, heads))
    return o, torch.cat([state, *reversed(ended)]).unflatten(0, (-1, heads)) if output_final_state else None


class _Gathered(torch.autograd.Function):
    """What all holders of rows give; backward, what they have to say of it."""

    @staticmethod
    def forward(ctx, x: Tensor, border: Border) -> Tensor:
        ctx.border = border
        return border.gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.border.gather(grad)[:, ctx.border.number].sum(0), None


def _passed_on(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    sequences: Sequences,
    allow_neg_eigval: bool,
    border: Border,
) -> Tensor:
    """The states before the sequences, of which the first comes from the rows before. The last one's map, M beside B,
    is what becomes of the identity beside nothing under values that are nothing beside v."""
    length, (heads, value_dim), key_dim = sequences.lengths[-1], v.shape[1:], k.shape[2]
    q, k, v, a, b = (x[-length:] for x in (q, k, v, a, b))
    identity = torch.eye(key_dim, key_dim + value_dim, dtype=at_least_fp32(v).dtype, device=v.device)
    start, alone = identity.expand(1, heads, -1, -1), Sequences.of((length,), v.device)
    values = F.pad(v, (key_dim, 0))
    _, last = gated_delta_rule(q, k, values, a, b, A_log, dt_bias, alone, start, True, allow_neg_eigval)
    maps, rests = _Gathered.apply(last[0], border).split([key_dim, value_dim], -1)
    state = 0 * rests[border.number]  # of what all gave, so that backward all take part, too
    for number in range(border.first, border.number):
        state = torch.baddbmm(rests[number], maps[number], state)
    return torch.cat([state[None], state.new_zeros(sequences.count - 1, *state.shape)])


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    sequences: Sequences,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    allow_neg_eigval: bool = False,
    border: Border | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `megahybrid_kernels.gated_delta_rule`.

    With G_i the sum of a chunk's log-decays up to token i and S the state before it, the chunk's writes u_i solve a
    unit lower triangular system, and outputs and the next state follow:
        u_i + beta_i sum_{j<i} exp(G_i - G_j) (k_i . k_j) u_j = beta_i (v_i - exp(G_i) S^T k_i)
        o_i = exp(G_i) S^T q_i + sum_{j<=i} exp(G_i - G_j) (q_i . k_j) u_j
        S'  = exp(G_end) S + sum_j exp(G_end - G_j) k_j u_j^T
    (Yang et al., "Gated Delta Networks", arXiv 2412.06464, section 3.3).
    """
    if border is not None:
        initial_state = _passed_on(q, k, v, a, b, A_log, dt_bias, sequences, allow_neg_eigval, border)
    plan = plan_chunks(sequences.lengths, v.device)
    out_dtype, dtype = v.dtype, at_least_fp32(v).dtype
    groups = v.shape[1] // k.shape[1]
    q, k, v, a, b = (_to_chunks(x.to(dtype), plan) for x in (q, k, v, a, b))
    q = q * (_inverse_norm(q) * k.shape[-1] ** -0.5)
    k = k * _inverse_norm(k)
    beta = b.sigmoid() * (2 if allow_neg_eigval else 1)
    beta = beta.masked_fill(plan.filler, 0)[..., None]
    g = -A_log.to(dtype).exp()[:, None] * F.softplus(a + dt_bias.to(dtype)[:, None])

    # Summed in float64: beyond a strong decay float32 differences would lose the weak ones, and the gradients of
    # decays on either side of it, which must cancel, would not.
    G = g.masked_fill(plan.filler, 0).double().cumsum(-1)
    later = torch.ones(2 * g.shape[-1:], dtype=torch.bool, device=g.device).triu(1)
    between = (G[..., :, None] - G[..., None, :]).to(dtype).masked_fill(later, -torch.inf).exp()
    since_start, until_end = G.to(dtype).exp()[..., None], (G[..., -1:] - G).to(dtype).exp()[..., None]

    def per_value_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(groups, 1) if groups > 1 else x

    lower, attention = between * per_value_head(k @ k.mT) * beta, between * per_value_head(q @ k.mT)
    q, k = per_value_head(q), per_value_head(k)
    if initial_state is None:
        state = v.new_zeros(sequences.count, v.shape[1], k.shape[-1], v.shape[-1])
    else:
        state = initial_state.to(dtype).index_select(0, plan.order)
    per_chunk = (lower, attention, since_start * q, -beta * since_start * k, beta * v, until_end * k)
    o, state = _scan((*per_chunk, since_start[..., -1:, :]), state, plan.running, output_final_state)
    return _to_tokens(o, plan).to(out_dtype), state if state is None else state.index_select(0, plan.rank)
