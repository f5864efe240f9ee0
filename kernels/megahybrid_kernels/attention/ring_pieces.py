"""Attention of many new tokens to a window's ring and each other, by an attention to packed keys.

The packed keys are each sequence's ring in order of position and then its new tokens. Where a ring is not full yet, its
blanks come first and count as a sequence of their own, which has no queries: so nothing has to know on the host how
many tokens a ring holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megahybrid_kernels.attention.key_value_cache import KeyValueCache
from megahybrid_kernels.attention.reference import gather_slots
from megahybrid_kernels.sequences import Sequences

PackedAttention = Callable[[Tensor, Tensor, Tensor, Sequences, Sequences, int | None], Tensor]
"""(q, k, v, queries, keys, window) -> o, where a sequence's last query sees its last key, and so on backwards."""


def attention_to_ring(
    attend: PackedAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KeyValueCache,
    sequences: Sequences,
    window_size: int,
) -> tuple[Tensor, KeyValueCache]:
    """`attention_with_cache` with a window; `sequences.starts` None says that the ring is empty."""
    rows, last = sequences, sequences.cu_seqlens.diff().long() - 1
    queries = keys = sequences
    if sequences.starts is not None:
        rows, last = sequences.behind(window_size), last + sequences.starts
        k, v = (_behind_ring(x, ring, sequences, rows) for x, ring in ((k, cache.k), (v, cache.v)))
        queries, keys = _with_blanks(sequences, rows, window_size)
    o = attend(q, k, v, queries, keys, window_size)
    places = _last_rows(rows.cu_seqlens[1:], last, window_size)
    return o, KeyValueCache(_ring_of(k, *places), _ring_of(v, *places), places[1])


def _behind_ring(new: Tensor, ring: Tensor, sequences: Sequences, rows: Sequences) -> Tensor:
    """`[rows, heads, D]`: the tokens of the ring `[sequences, heads, size, D]`, the oldest first, and the new ones."""
    size = ring.shape[2]
    slots = torch.arange(size, device=new.device)
    in_order = gather_slots(ring, (sequences.starts[:, None] + slots) % size).transpose(1, 2)
    x = new.new_empty(rows.tokens, *new.shape[1:])
    x[rows.cu_seqlens[:-1, None].long() + slots] = in_order
    x[sequences.rows_behind(size)] = new
    return x


def _with_blanks(sequences: Sequences, rows: Sequences, size: int) -> tuple[Sequences, Sequences]:
    """(queries, keys) with the blanks of each ring, `[rows]` of them, as a sequence without queries before its own."""
    begins = rows.cu_seqlens[:-1]
    real = begins + (size - sequences.starts).clamp(min=0).to(torch.int32)
    key_borders = torch.cat([torch.stack([begins, real], 1).flatten(), rows.cu_seqlens[-1:]])
    firsts = sequences.cu_seqlens[:-1]
    query_borders = torch.cat([torch.stack([firsts, firsts], 1).flatten(), sequences.cu_seqlens[-1:]])
    # Of the lengths only the largest is read.
    return Sequences(query_borders, sequences.lengths), Sequences(key_borders, rows.lengths)


def _last_rows(ends: Tensor, last: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(rows, positions), int64 `[sequences, size]`, of a ring of each sequence's last `size` tokens in a packed row.

    ends, last: `[sequences]`, the row after the last token, whose position is `last`. `positions` is -1 for blanks.
    """
    age = (last[:, None] - torch.arange(size, device=ends.device)) % size
    return (ends.long()[:, None] - 1 - age).clamp(min=0), (last[:, None] - age).clamp(min=-1)


def _ring_of(x: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """`[sequences, heads, size, D]` of packed x `[tokens, heads, D]`; 0 where blank."""
    return x[rows].transpose(1, 2).masked_fill((positions < 0)[:, None, :, None], 0).contiguous()
