"""Attention under learnable token eviction in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid_kernels.attention.reference import (
    QUERY_BLOCK,
    Columns,
    Padded,
    blocked_attention,
    cached_attention,
    gather_slots,
    query_blocks,
    ring_slots,
    window_end,
)
from megahybrid_kernels.exit_positions.reference import NEVER, exit_positions, exits_of_candidates
from megahybrid_kernels.lte_attention.cache import LTECache
from megahybrid_kernels.lte_attention.counterfactual import with_unseen
from megahybrid_kernels.lte_attention.displaced import with_displaced
from megahybrid_kernels.lte_attention.gate import Gate
from megahybrid_kernels.precision import at_least_fp32
from megahybrid_kernels.sequences import Sequences


class _MaskingGradient(torch.autograd.Function):
    """v as it is; backward hands the gradient of a gate `gamma * v` at gamma = 1 to the score."""

    @staticmethod
    def forward(ctx, v: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        ctx.score_dtype = score.dtype
        return v.view_as(v)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        (v,) = ctx.saved_tensors
        return grad, (at_least_fp32(grad) * at_least_fp32(v)).sum(-1).to(ctx.score_dtype)


class _LogitGate(torch.autograd.Function):
    """Zeros, to be added to logits after division by sqrt(head_dim); their gradient goes to the score."""

    @staticmethod
    def forward(ctx, score: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        ctx.factor, ctx.score_dtype = head_dim**0.5, score.dtype
        return torch.zeros_like(score, dtype=dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return (at_least_fp32(grad) * ctx.factor).to(ctx.score_dtype), None, None


def visible_until(
    score: Tensor, sequences: Sequences, window_size: int, sink_size: int, buffer_size: int | None
) -> Tensor:
    """int64 `[tokens, heads]`: each key is visible from its own row on to the rows before this one."""
    window = window_end(sequences, window_size + 1)[:, None]
    end = sequences.cu_seqlens.long()[sequences.index + 1, None]
    if buffer_size is None:
        kept = (score > 0) | (sequences.positions < sink_size)[:, None]
        return torch.where(kept, end, window)
    exits = exit_positions(score, sequences, window_size, sink_size, buffer_size)
    origin = (torch.arange(sequences.tokens, device=score.device) - sequences.positions)[:, None]
    return torch.maximum(window, torch.minimum(exits, end - origin) + origin)


def _kept_columns(until: Tensor, first_key: int, first: int, end: int, window_size: int) -> Columns:
    """Key rows that queries first:end need: the window, and per head what is kept before it."""
    window = max(first_key, first - window_size)
    everything = slice(first_key, end)
    # Counting the kept keys would make a GPU wait for the host.
    if until.is_cuda or window == first_key:
        return everything
    kept = first < until[first_key:window].T
    longest = int(kept.sum(1).max())
    if 4 * (window - first_key - longest) < end - first_key:
        return everything
    # Heads that keep fewer than the longest are filled up with keys that the mask hides.
    far = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest] + first_key
    near = torch.arange(window, end, device=until.device).expand(until.shape[1], -1)
    return torch.cat([far, near], 1)


def lte_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    sequences: Sequences,
    window_size: int,
    sink_size: int,
    buffer_size: int | None = None,
    gate: Gate = "value",
) -> Tensor:
    """See `megahybrid_kernels.lte_attention.lte_attention`."""
    until = visible_until(score.detach(), sequences, window_size, sink_size, buffer_size)
    blocks = [
        (slice(first, end), _kept_columns(until, first_key, first, end, window_size))
        for first, end, first_key in query_blocks(sequences.lengths, QUERY_BLOCK)
    ]
    if gate == "value" or not score.requires_grad:
        return blocked_attention(q, k, _MaskingGradient.apply(v, score), blocks, until)
    if gate == "displacing":
        score = with_displaced(score, sequences, window_size, sink_size, buffer_size)
    # One more channel: 1 of every query times a key's gate.
    head_dim = q.shape[2]
    gated = torch.cat([k, _LogitGate.apply(score, head_dim, k.dtype)[..., None]], -1)
    queries, values = F.pad(q, (0, 1), value=1.0), F.pad(v, (0, 1))
    o = blocked_attention(queries, gated, values, blocks, until, head_dim**-0.5)[..., :head_dim]
    return o if gate == "logit" else with_unseen(o, q, k, v, score, until, sequences)


def lte_attention_with_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    cache: LTECache,
    sequences: Sequences,
    window_size: int,
    sink_size: int,
    buffer_size: int,
    delay: int,
) -> tuple[Tensor, LTECache]:
    """See `megahybrid_kernels.lte_attention.lte_attention_with_cache`."""
    padded = Padded.of(sequences)
    heads = k.shape[1]
    starts, ends = padded.starts[:, None], padded.ends[:, None]
    streamed = padded.heads_first(score.detach()).to(cache.score.dtype)

    def arrived_scores(positions: Tensor, otherwise: Tensor) -> Tensor:
        row = positions + delay
        inside = (positions >= 0) & (row >= starts) & (row < ends)
        found = gather_slots(streamed, (row - starts).clamp(0, streamed.shape[2] - 1))
        return torch.where(inside[:, None], found, otherwise)

    window_score = torch.cat(
        [arrived_scores(cache.positions, cache.score), arrived_scores(padded.positions, torch.zeros_like(streamed))], 2
    )
    window_positions = torch.cat([cache.positions, padded.positions], 1)[:, None].expand(-1, heads, -1)
    window_k = torch.cat([cache.k, padded.heads_first(k)], 2)
    window_v = torch.cat([cache.v, padded.heads_first(v)], 2)

    # Keys are the buffer, the old ring and the new tokens. What left the window before the first new query is in the
    # buffer or gone, though the ring still holds its last one.
    positions = torch.cat([cache.buffer_positions, window_positions], 2)
    scores = torch.cat([cache.buffer_score, window_score], 2)
    all_k, all_v = torch.cat([cache.buffer_k, window_k], 2), torch.cat([cache.buffer_v, window_v], 2)
    in_buffer = torch.arange(positions.shape[2], device=k.device) < buffer_size
    candidates = (positions >= 0) & ((scores > 0) | (positions < sink_size))
    candidates &= in_buffer | (positions >= (starts - window_size)[:, :, None])

    by_position = positions.argsort(dim=2, stable=True)
    scores_in_order, positions_in_order, candidates_in_order = (
        x.gather(2, by_position) for x in (scores, positions, candidates)
    )
    if max(sequences.lengths) == 1:
        exits = torch.full_like(positions, NEVER)
    else:
        exits_in_order = exits_of_candidates(
            *(x.flatten(0, 1) for x in (scores_in_order, positions_in_order, candidates_in_order)),
            window_size,
            sink_size,
            buffer_size,
        )
        exits = torch.empty_like(positions).scatter_(2, by_position, exits_in_order.view_as(positions))

    until = torch.maximum(positions + window_size + 1, torch.where(candidates, exits, 0)).masked_fill(positions < 0, 0)
    cached = buffer_size + window_size + 1
    o = cached_attention(q, all_k, all_v, sequences, padded, positions, until, cached)

    arrived = candidates_in_order & (positions_in_order + window_size + 1 <= ends[:, :, None])
    rank = torch.where(positions_in_order < sink_size, torch.inf, scores_in_order).masked_fill(~arrived, -torch.inf)
    rank, best = rank.sort(dim=2, descending=True, stable=True)
    blank, best = rank[..., :buffer_size] == -torch.inf, by_position.gather(2, best[..., :buffer_size])
    ring_positions, sources = ring_slots(padded, window_size + 1)
    return o, LTECache(
        k=gather_slots(window_k, sources),
        v=gather_slots(window_v, sources),
        positions=ring_positions,
        score=gather_slots(window_score, sources),
        buffer_k=gather_slots(all_k, best).masked_fill(blank[..., None], 0),
        buffer_v=gather_slots(all_v, best).masked_fill(blank[..., None], 0),
        buffer_score=scores.gather(2, best).masked_fill(blank, 0),
        buffer_positions=positions.gather(2, best).masked_fill(blank, -1),
    )
