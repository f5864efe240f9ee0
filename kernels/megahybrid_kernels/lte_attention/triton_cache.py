"""The cache after many tokens: which of them the buffer holds, and copies of those and of the window's tokens.

Two launches. The first walks along each sequence and KV head once, `9 or 12` bytes a token; the second moves what the
cache has, so its work does not grow with the tokens.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.integers import cdiv, tile_width
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.lte_attention.cache import LTECache
from megahybrid_kernels.sequences import Sequences

# Tokens of a step of the walk; slots of a program that copies.
_TOKENS, _SLOTS = 2048, 32


@kernel
def lte_held_kernel(
    worth, exits, borders, held, heads, window, buffer_slots, CAPPED: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """int32 `[sequences, heads, buffer_slots]`: the rows that a query after the last one finds in the buffer, in
    ascending order and then -1. worth, exits: `[rows, heads]`."""
    head, sequence = tl.program_id(0) % heads, tl.program_id(0) // heads
    begin, end = tl.load(borders + sequence), tl.load(borders + sequence + 1)
    held += (sequence.to(tl.int64) * heads + head) * buffer_slots
    arrived = end - window  # the rows before have left that query's window
    count = 0
    for first in tl.range(begin, arrived, TOKENS):
        row = first + tl.arange(0, TOKENS)
        place = row.to(tl.int64) * heads + head
        stays = tl.load(worth + place, mask=row < arrived, other=0) > 0
        if CAPPED:
            # Exits count from the sequence's first row here.
            stays = stays & (tl.load(exits + place, mask=row < arrived, other=0) > end - begin)
        one = stays.to(tl.int32)
        tl.store(held + count + tl.cumsum(one, 0) - 1, row, mask=stays)
        count += tl.sum(one, 0)
    for first in tl.range(count, buffer_slots, TOKENS):
        slot = first + tl.arange(0, TOKENS)
        tl.store(held + slot, -1, mask=slot < buffer_slots)


@kernel
def lte_fill_cache_kernel(
    k, v, score, positions, borders, held, ring_k, ring_v, ring_positions, ring_score, buffer_k, buffer_v,
    buffer_score, buffer_positions, k_stride, k_head_stride, v_stride, v_head_stride, position_stride,
    position_head_stride, heads, window_slots, buffer_slots,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Some slots of a sequence and KV head, counted through the window's ring and then the buffer; blanks hold 0."""
    blocks = tl.cdiv(window_slots + buffer_slots, SLOTS)
    pair = tl.program_id(0) // blocks
    head, sequence = (pair % heads).to(tl.int64), (pair // heads).to(tl.int64)
    pair = pair.to(tl.int64)
    end = tl.load(borders + sequence + 1).to(tl.int64)
    slot = tl.program_id(0) % blocks * SLOTS + tl.arange(0, SLOTS)
    in_ring = slot < window_slots
    in_buffer = (in_ring == 0) & (slot < window_slots + buffer_slots)
    positions += head * position_head_stride
    last = tl.load(positions + (end - 1) * position_stride)
    age = (last + window_slots - slot) % window_slots
    buffer_slot = slot - window_slots
    kept = tl.load(held + pair * buffer_slots + buffer_slot, mask=in_buffer, other=-1)
    row = tl.where(in_ring, end - 1 - age, kept.to(tl.int64))
    real = (in_ring & (age <= last)) | (in_buffer & (kept >= 0))

    position = tl.load(positions + row * position_stride, mask=real, other=-1)
    value = tl.load(score + row * heads + head, mask=real, other=0)
    ring_place, buffer_place = pair * window_slots + slot, pair * buffer_slots + buffer_slot
    tl.store(ring_positions + sequence * window_slots + slot, position, mask=in_ring & (head == 0))
    tl.store(ring_score + ring_place, value, mask=in_ring)
    tl.store(buffer_positions + buffer_place, position, mask=in_buffer)
    tl.store(buffer_score + buffer_place, value, mask=in_buffer)

    column = tl.arange(0, WIDTH)
    mask = real[:, None] & (column < HEAD_DIM)[None, :]
    k_tile = tl.load(k + row[:, None] * k_stride + head * k_head_stride + column[None, :], mask=mask, other=0)
    v_tile = tl.load(v + row[:, None] * v_stride + head * v_head_stride + column[None, :], mask=mask, other=0)
    ring_mask = in_ring[:, None] & (column < HEAD_DIM)[None, :]
    ring_places = ring_place[:, None] * HEAD_DIM + column[None, :]
    tl.store(ring_k + ring_places, k_tile, mask=ring_mask)
    tl.store(ring_v + ring_places, v_tile, mask=ring_mask)
    buffer_mask = in_buffer[:, None] & (column < HEAD_DIM)[None, :]
    buffer_places = buffer_place[:, None] * HEAD_DIM + column[None, :]
    tl.store(buffer_k + buffer_places, k_tile, mask=buffer_mask)
    tl.store(buffer_v + buffer_places, v_tile, mask=buffer_mask)


def cache_after(
    k: Tensor,
    v: Tensor,
    score: Tensor,
    positions: Tensor,
    worth: Tensor,
    exits: Tensor | None,
    sequences: Sequences,
    window_size: int,
    buffer_size: int,
) -> LTECache:
    """The cache after packed rows.

    Args:
        k, v: `[rows, heads, head_dim]`, each row contiguous.
        score: `[rows, heads]`, contiguous, 0 where it has not arrived yet.
        positions: int64 `[rows, heads]`, of any strides.
        worth: `[rows, heads]`, contiguous, positive for candidates.
        exits: as of `exit_positions`, counted from each sequence's first row; None where none leaves.
        sequences: the rows' borders; each sequence's last `window_size + 1` rows, or all of a shorter one from its
            position 0 on, lie in order of position.
    """
    heads, head_dim = k.shape[1:]
    count, window_slots, device = sequences.count, window_size + 1, k.device

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, *shape, dtype=dtype, device=device)

    held = new(heads, buffer_size, dtype=torch.int32)
    lte_held_kernel[heads * count](
        worth, worth if exits is None else exits, sequences.cu_seqlens, held, heads, window_size,
        buffer_size, CAPPED=exits is not None, TOKENS=_TOKENS, num_warps=8,
    )  # fmt: skip
    cache = LTECache(
        k=new(heads, window_slots, head_dim, dtype=k.dtype),
        v=new(heads, window_slots, head_dim, dtype=v.dtype),
        positions=new(window_slots, dtype=torch.int64),
        score=new(heads, window_slots, dtype=score.dtype),
        buffer_k=new(heads, buffer_size, head_dim, dtype=k.dtype),
        buffer_v=new(heads, buffer_size, head_dim, dtype=v.dtype),
        buffer_score=new(heads, buffer_size, dtype=score.dtype),
        buffer_positions=new(heads, buffer_size, dtype=torch.int64),
    )
    lte_fill_cache_kernel[cdiv(window_slots + buffer_size, _SLOTS) * heads * count](
        k, v, score, positions, sequences.cu_seqlens, held, cache.k, cache.v, cache.positions, cache.score,
        cache.buffer_k, cache.buffer_v, cache.buffer_score, cache.buffer_positions, *k.stride()[:2], *v.stride()[:2],
        *positions.stride(), heads, window_slots, buffer_size, HEAD_DIM=head_dim,
        WIDTH=tile_width(head_dim), SLOTS=_SLOTS, num_warps=4,
    )  # fmt: skip
    return cache
