"""Attention over packed sequences in PyTorch: blocks of queries against the keys that they can reach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid_kernels.attention.growing_cache import GrowingCache
from megahybrid_kernels.attention.key_value_cache import KeyValueCache
from megahybrid_kernels.precision import at_least_fp32
from megahybrid_kernels.sequences import Sequences

QUERY_BLOCK = 128
CACHED_QUERY_BLOCK = 256

Columns = slice | Tensor
"""Key rows of a block: a slice for all heads, or int64 `[kv_heads, columns]` for rows picked per head."""


@lru_cache(maxsize=256)
def query_blocks(lengths: tuple[int, ...], size: int) -> tuple[tuple[int, int, int], ...]:
    """(first row, end row, first key) of blocks of about `size` queries: long sequences are cut evenly, short
    neighbours share a block so that many of them cost no more than one long one."""
    blocks: list[tuple[int, int, int]] = []
    shared = row = 0
    for length in lengths:
        if row + length - shared > size:
            if row > shared:
                blocks.append((shared, row, shared))
            shared = row
        if length > size:
            pieces = -(-length // size)
            cuts = [row + length * piece // pieces for piece in range(pieces + 1)]
            blocks += [(first, end, row) for first, end in pairwise(cuts)]
            shared = row + length
        row += length
    if row > shared:
        blocks.append((shared, row, shared))
    return tuple(blocks)


def window_end(sequences: Sequences, window_size: int | None) -> Tensor:
    """int64 `[tokens]`: the row before which queries still find each key in their window of `window_size` keys."""
    end = sequences.cu_seqlens.long()[sequences.index + 1]
    if window_size is None:
        return end
    return torch.minimum(end, torch.arange(sequences.tokens, device=end.device) + window_size)


def between(keys: Tensor, until: Tensor, queries: Tensor) -> Tensor:
    """bool `[..., queries, keys]`: whether the key's place <= the query's < the key's `until`.

    A key is seen without a gap from its own place on: first in the window, then while it is kept.
    """
    keys, queries = keys.to(torch.int32)[..., None, :], queries.to(torch.int32)[..., None]
    until = until.clamp(max=torch.iinfo(torch.int32).max).to(torch.int32)[..., None, :]
    return (keys <= queries) & (queries < until)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention under a boolean mask; every query must see at least one key.

    Shapes: q `[N, queries, query_heads, D]`; k, v `[N, kv_heads, keys, D]`; visible `[N or 1, kv_heads or 1, queries,
    keys]`; returns q's shape. Logits are scaled by `scale`, by `D ** -0.5` when left out. The query heads of a group
    become rows, so keys are never repeated.
    """
    count, queries, query_heads, head_dim = q.shape
    heads = k.shape[1]
    groups = query_heads // heads
    rows = q.view(count, queries, heads, groups, head_dim).permute(0, 2, 3, 1, 4)
    if groups > 1:
        visible = visible.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(2, 3)
    o = F.scaled_dot_product_attention(*map(_aligned, (rows.flatten(2, 3), k, v)), attn_mask=visible, scale=scale)
    return o.unflatten(2, (groups, queries)).permute(0, 3, 1, 2, 4).reshape(q.shape)


def _aligned(x: Tensor) -> Tensor:
    """x, laid out anew unless its rows begin at multiples of 16 bytes: torch picks kernels that fail without."""
    apart = (stride * x.element_size() % 16 for stride in x.stride()[:-1])
    return x.contiguous() if any(apart) or x.stride(-1) != 1 else x


def _flat(columns: Tensor) -> Tensor:
    heads = columns.shape[0]
    return (columns * heads + torch.arange(heads, device=columns.device)[:, None]).flatten()


def _take(x: Tensor, columns: Columns) -> Tensor:
    """`[tokens, heads, D]` -> `[heads, columns, D]`."""
    if isinstance(columns, slice):
        return x[columns].transpose(0, 1)
    return x.reshape(-1, x.shape[-1])[_flat(columns)].unflatten(0, columns.shape)


def _mask(rows: slice, columns: Columns, until: Tensor) -> Tensor:
    """bool `[1, heads or 1, rows, columns]` of a block."""
    places = torch.arange(until.shape[0], device=until.device)
    if isinstance(columns, slice):
        return between(places[columns], until[columns].T, places[rows])[None]
    return between(columns, until.T.gather(1, columns), places[rows])[None]


def _add(total: Tensor, columns: Columns, gradient: Tensor) -> None:
    if isinstance(columns, slice):
        total[columns] += gradient.transpose(0, 1)
    else:
        total.view(-1, total.shape[-1]).index_add_(0, _flat(columns), gradient.flatten(0, 1).to(total.dtype))


class _BlockedAttention(torch.autograd.Function):
    """Each block keeps a graph of its own, and the gradients of keys that blocks share are added in place: autograd
    alone would write a zero-filled gradient as long as the whole row for every block."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, blocks, until: Tensor, scale: float | None) -> Tensor:
        ctx.parts, outputs = [], []
        ctx.key_shape = k.shape
        for rows, columns in blocks:
            pieces = (q[rows], _take(k, columns), _take(v, columns))
            leaves = tuple(piece.detach().requires_grad_() for piece in pieces)
            with torch.enable_grad():
                o = attend(*(leaf[None] for leaf in leaves), _mask(rows, columns, until), scale)
            ctx.parts.append((rows, columns, leaves, o))
            outputs.append(o.detach()[0])
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        dk = torch.zeros(ctx.key_shape, dtype=at_least_fp32(grad).dtype, device=grad.device)
        dv = torch.zeros_like(dk)
        dqs = []
        for rows, columns, leaves, o in ctx.parts:
            dq, dk_block, dv_block = torch.autograd.grad(o, leaves, grad[rows][None])
            dqs.append(dq)
            _add(dk, columns, dk_block)
            _add(dv, columns, dv_block)
        ctx.parts.clear()
        return torch.cat(dqs), dk.to(grad.dtype), dv.to(grad.dtype), None, None, None


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Iterable[tuple[slice, Columns]],
    until: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Attention of q `[tokens, query_heads, D]` to k, v `[tokens, kv_heads, D]`, block by block.

    `blocks` lists (query rows, key columns) with the rows in order and without gaps. until: int64 `[tokens, kv_heads
    or 1]`; each key is visible from its own row on to the rows before this one. `scale` as in `attend`.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _BlockedAttention.apply(q, k, v, blocks, until, scale)
    parts = [
        attend(q[rows][None], _take(k, columns)[None], _take(v, columns)[None], _mask(rows, columns, until), scale)[0]
        for rows, columns in blocks
    ]
    return torch.cat(parts)


def attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, window_size: int | None = None) -> Tensor:
    """See `megahybrid_kernels.attention.attention`."""
    reach = sequences.tokens if window_size is None else window_size - 1
    blocks = [
        (slice(first, end), slice(max(first_key, first - reach), end))
        for first, end, first_key in query_blocks(sequences.lengths, QUERY_BLOCK)
    ]
    return blocked_attention(q, k, v, blocks, window_end(sequences, window_size)[:, None])


@dataclass(frozen=True)
class Padded:
    """Index of a packed row as `[sequences, longest]`.

    Attributes:
        rows: int64, packed row of each entry (some valid row where padded); `packed[rows]` pads.
        valid: bool, entries that are tokens.
        positions: int64, absolute position of each entry, -1 where padded.
        starts, ends: int64 `[sequences]`, position of the first token and the one after the last.
    """

    rows: Tensor
    valid: Tensor
    positions: Tensor
    starts: Tensor
    ends: Tensor

    @classmethod
    def of(cls, sequences: Sequences) -> Padded:
        lengths = sequences.cu_seqlens.diff().long()
        offsets = torch.arange(max(sequences.lengths), device=lengths.device)
        valid = offsets < lengths[:, None]
        rows = (sequences.cu_seqlens[:-1, None] + offsets).clamp(max=sequences.tokens - 1)
        starts = torch.zeros_like(lengths) if sequences.starts is None else sequences.starts
        positions = torch.where(valid, starts[:, None] + offsets, -1)
        return cls(rows, valid, positions, starts, starts + lengths)

    def heads_first(self, x: Tensor) -> Tensor:
        """`[tokens, heads, ...]` -> `[sequences, heads, longest, ...]`, padding not cleared."""
        return x[self.rows].transpose(1, 2)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    padded: Padded,
    positions: Tensor,
    until: Tensor,
    cached: int,
) -> Tensor:
    """Attention of new packed queries to k, v `[N, kv_heads, slots, D]`, cached and new keys.

    positions, until: int64 `[N or 1, kv_heads or 1, slots]`; a key is visible to queries at `positions <= query <
    until`. The n-th new query of a sequence finds all its keys in the first `cached + n + 1` slots.
    """
    outputs = []
    longest = padded.rows.shape[1]
    for first in range(0, longest, CACHED_QUERY_BLOCK):
        end = min(first + CACHED_QUERY_BLOCK, longest)
        reach = min(cached + end, k.shape[2])
        mask = between(positions[..., :reach], until[..., :reach], padded.positions[:, None, first:end])
        # A padded query sees everything: a row without any key could turn gradients into NaN.
        mask |= ~padded.valid[:, None, first:end, None]
        outputs.append(attend(q[padded.rows[:, first:end]], k[:, :, :reach], v[:, :, :reach], mask))
    return torch.cat(outputs, 1)[sequences.index, sequences.offsets]


def ring_slots(padded: Padded, size: int) -> tuple[Tensor, Tensor]:
    """(positions, sources), int64 `[sequences, size]`, of a ring of the last `size` tokens after the new ones.

    `positions` is -1 for blanks; `sources` indexes the old ring followed by the new tokens.
    """
    slots = torch.arange(size, device=padded.rows.device)
    last = padded.ends[:, None] - 1
    positions = (last - (last - slots) % size).clamp(min=-1)
    new = positions - padded.starts[:, None]
    return positions, torch.where(new >= 0, size + new, slots)


def gather_slots(x: Tensor, sources: Tensor) -> Tensor:
    """Slots `sources` (`[N, n]` or per head `[N, heads, n]`) of x `[N, heads, slots, D]` or `[N, heads, slots]`."""
    if sources.dim() == 2:
        sources = sources[:, None].expand(-1, x.shape[1], -1)
    if x.dim() == 4:
        sources = sources[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, sources)


def attention_with_window_cache(
    q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache, sequences: Sequences, window_size: int
) -> tuple[Tensor, KeyValueCache]:
    """See `megahybrid_kernels.attention.attention_with_cache`."""
    padded = Padded.of(sequences)
    k = torch.cat([cache.k, padded.heads_first(k)], 2)
    v = torch.cat([cache.v, padded.heads_first(v)], 2)
    positions = torch.cat([cache.positions, padded.positions], 1)
    until = (positions + window_size).masked_fill(positions < 0, 0)
    o = cached_attention(q, k, v, sequences, padded, positions[:, None], until[:, None], window_size)
    positions, sources = ring_slots(padded, window_size)
    return o, KeyValueCache(gather_slots(k, sources), gather_slots(v, sources), positions)


def attention_with_growing_cache(
    q: Tensor, k: Tensor, v: Tensor, cache: GrowingCache, sequences: Sequences
) -> tuple[Tensor, GrowingCache]:
    """See `megahybrid_kernels.attention.attention_with_cache`."""
    new = cache.append(k, v, sequences)
    # Slots are positions, so causality alone hides what a sequence has not filled yet.
    positions = torch.arange(new.slots, device=q.device)[None, None]
    until = torch.full_like(positions, torch.iinfo(torch.int32).max)
    padded = Padded.of(sequences)
    return cached_attention(q, new.k, new.v, sequences, padded, positions, until, cache.slots), new
