"""One step of decoding under learnable token eviction: attention over window and buffer, then the buffer's update.

Two launches a step, whose shapes depend on nothing in the data, so that a CUDA graph can hold them. The cache is
updated in place, and nothing of it is copied but the one row that enters the buffer. A step costs the bytes of
`(window + 1 + buffer) * 2 * head_dim` numbers for each sequence and KV head, however long the context is.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.lte_attention.reference import LTECache

_SLOTS = 64
# Programs that fill a GPU of some hundred multiprocessors with a few each; fewer sequences are split over their slots.
_PROGRAMS = 512
_MOST_SPLITS = 64


@triton.jit
def _attend_slots(
    q, k, v, ring_k, ring_v, ring_positions, buffer_k, buffer_v, buffer_positions, positions, parts, statistics,
    window_slots, buffer_slots, span, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a KV head's queries to `span` of its slots, buffer first; writes the new token into the ring.

    parts: fp32 `[sequences, kv_heads, splits, GROUPS, HEAD_DIM]`, not normalised; statistics: the same without head dim
    but with (peak in powers of two, sum).
    """
    split, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pair = sequence.to(tl.int64) * tl.num_programs(1) + head
    column, row = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    real = column < HEAD_DIM
    rows_mask = (row < GROUPS)[:, None] & real[None, :]
    q_tile = tl.load(q + (pair * GROUPS + row)[:, None] * HEAD_DIM + column[None, :], mask=rows_mask, other=0)
    new_slot = (tl.load(positions + sequence) % window_slots).to(tl.int32)
    new_k = tl.load(k + pair * HEAD_DIM + column, mask=real, other=0)
    new_v = tl.load(v + pair * HEAD_DIM + column, mask=real, other=0)

    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -1e30, tl.float32)
    first = split * span
    end = tl.minimum(first + span, buffer_slots + window_slots)
    for start in tl.range(first, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        in_buffer, in_ring = slot < buffer_slots, (slot >= buffer_slots) & (slot < end)
        in_buffer = in_buffer & (slot < end)
        ring_slot = slot - buffer_slots
        is_new = in_ring & (ring_slot == new_slot)
        held = tl.load(buffer_positions + pair * buffer_slots + slot, mask=in_buffer, other=-1)
        recent = tl.load(ring_positions + sequence.to(tl.int64) * window_slots + ring_slot, mask=in_ring, other=-1)
        visible = (held >= 0) | (recent >= 0) | is_new
        old_ring = (in_ring & (is_new == 0))[:, None] & real[None, :]
        buffer_mask = in_buffer[:, None] & real[None, :]
        ring_places = (pair * window_slots + ring_slot)[:, None] * HEAD_DIM + column[None, :]
        buffer_places = (pair * buffer_slots + slot)[:, None] * HEAD_DIM + column[None, :]
        k_tile = tl.load(tl.where(in_buffer[:, None], buffer_k + buffer_places, ring_k + ring_places),
                         mask=buffer_mask | old_ring, other=0)  # fmt: skip
        v_tile = tl.load(tl.where(in_buffer[:, None], buffer_v + buffer_places, ring_v + ring_places),
                         mask=buffer_mask | old_ring, other=0)  # fmt: skip
        k_tile = tl.where(is_new[:, None], new_k[None, :], k_tile)
        v_tile = tl.where(is_new[:, None], new_v[None, :], v_tile)
        tl.store(ring_k + ring_places, k_tile, mask=is_new[:, None] & real[None, :])
        tl.store(ring_v + ring_places, v_tile, mask=is_new[:, None] & real[None, :])

        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        logits = tl.where(visible[None, :], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1) * scale)
        p = tl.exp2(logits * scale - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
        peak = new_peak

    out = (pair * tl.num_programs(0) + split) * GROUPS + row
    tl.store(parts + out[:, None] * HEAD_DIM + column[None, :], acc, mask=rows_mask)
    tl.store(statistics + out * 2, peak, mask=row < GROUPS)
    tl.store(statistics + out * 2 + 1, total, mask=row < GROUPS)


@triton.jit
def _admit(
    late_score, ring_k, ring_v, ring_positions, ring_score, buffer_k, buffer_v, buffer_positions, buffer_score,
    position, sequence, head, pair, window_slots, buffer_slots, sinks, delay,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BUFFER: tl.constexpr,
):  # fmt: skip
    """The ring's bookkeeping, and the buffer as the next query finds it: the token about to leave the window enters.

    A free slot is taken first, else the least score is displaced iff it is less, among equal ones the youngest.
    """
    ring_score += pair * window_slots
    late = tl.load(late_score + pair).to(ring_score.dtype.element_ty)
    tl.store(ring_score + position % window_slots, 0.0)
    tl.debug_barrier()  # with no delay the next line writes the same slot
    tl.store(ring_score + (position - delay) % window_slots, late, mask=position >= delay)
    tl.store(ring_positions + sequence.to(tl.int64) * window_slots + position % window_slots, position, mask=head == 0)

    leaving = position - (window_slots - 1)
    leaving_slot = (position + 1) % window_slots
    score = tl.load(ring_score + leaving_slot, mask=(leaving >= 0) & (leaving != position - delay), other=0)
    score = tl.where(leaving == position - delay, late, score)
    worth = tl.where(leaving < sinks, float("inf"), score)

    slot = tl.arange(0, BUFFER)
    exists = slot < buffer_slots
    held = tl.load(buffer_positions + pair * buffer_slots + slot, mask=exists, other=-1)
    held_score = tl.load(buffer_score + pair * buffer_slots + slot, mask=exists, other=0)
    held_worth = tl.where(held < sinks, float("inf"), held_score)
    held_worth = tl.where(held < 0, float("-inf"), held_worth)
    held_worth = tl.where(exists, held_worth, float("inf"))
    least = tl.min(held_worth, 0)
    youngest = tl.max(tl.where(exists & (held_worth == least), held, -1), 0)
    loser = tl.min(tl.where(exists & (held_worth == least) & (held == youngest), slot, BUFFER), 0)
    enters = (leaving >= 0) & (worth > 0) & (worth > least) & (loser < buffer_slots)

    place = pair * buffer_slots + loser
    column = tl.arange(0, WIDTH)
    mask = (column < HEAD_DIM) & enters
    source = (pair * window_slots + leaving_slot) * HEAD_DIM + column
    tl.store(buffer_k + place * HEAD_DIM + column, tl.load(ring_k + source, mask=mask, other=0), mask=mask)
    tl.store(buffer_v + place * HEAD_DIM + column, tl.load(ring_v + source, mask=mask, other=0), mask=mask)
    tl.store(buffer_positions + place, leaving, mask=enters)
    tl.store(buffer_score + place, score, mask=enters)


@triton.jit
def _join_and_admit(
    o, parts, statistics, late_score, ring_k, ring_v, ring_positions, ring_score, buffer_k, buffer_v,
    buffer_positions, buffer_score, positions, window_slots, buffer_slots, sinks, delay, splits,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr, BUFFER: tl.constexpr,
):  # fmt: skip
    """Adds up the splits of a KV head's queries, always in the same order; then `_admit`."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    pair = sequence.to(tl.int64) * tl.num_programs(0) + head
    column, split = tl.arange(0, WIDTH), tl.arange(0, SPLITS)
    real, exists = column < HEAD_DIM, split < splits
    for row in tl.static_range(GROUPS):
        part = (pair * splits + split) * GROUPS + row
        peaks = tl.load(statistics + part * 2, mask=exists, other=-1e30)
        totals = tl.load(statistics + part * 2 + 1, mask=exists, other=0)
        mask = exists[:, None] & real[None, :]
        each = tl.load(parts + part[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0)
        weight = tl.exp2(peaks - tl.max(peaks, 0))
        y = tl.sum(each * weight[:, None], 0) / tl.sum(totals * weight, 0)
        tl.store(o + (pair * GROUPS + row) * HEAD_DIM + column, y.to(o.dtype.element_ty), mask=real)
    _admit(
        late_score, ring_k, ring_v, ring_positions, ring_score, buffer_k, buffer_v, buffer_positions, buffer_score,
        tl.load(positions + sequence), sequence, head, pair, window_slots, buffer_slots, sinks, delay,
        HEAD_DIM, WIDTH, BUFFER,
    )  # fmt: skip


def lte_attention_step(
    q: Tensor, k: Tensor, v: Tensor, score: Tensor, cache: LTECache, positions: Tensor, sink_size: int, delay: int
) -> Tensor:
    """One new token of every sequence: its attention, and `cache` brought up to date in place.

    It equals `lte_attention_with_cache` with sequences of one token, but for the order of the buffer's slots.

    Args:
        q: `[sequences, query_heads, head_dim]`; k, v: `[sequences, kv_heads, head_dim]`, of the new tokens.
        score: `[sequences, kv_heads]`, that of position `positions - delay`; without meaning before there is one.
        cache: contiguous; its shapes say how large window and buffer are.
        positions: int64 `[sequences]`, on the device, of the new tokens.
        sink_size, delay: as for `lte_attention_with_cache`.

    Returns:
        `[sequences, query_heads, head_dim]` in q's dtype.
    """
    count, heads, window_slots, head_dim = cache.k.shape
    buffer_slots, groups = cache.buffer_k.shape[2], q.shape[1] // heads
    q, k, v, score = (x.contiguous() for x in (q, k, v, score))
    slots = window_slots + buffer_slots
    splits = max(1, min(triton.cdiv(_PROGRAMS, count * heads), triton.cdiv(slots, _SLOTS), _MOST_SPLITS))
    span = triton.cdiv(triton.cdiv(slots, splits), _SLOTS) * _SLOTS
    splits = triton.cdiv(slots, span)
    parts = torch.empty(count, heads, splits, groups, head_dim, dtype=torch.float32, device=q.device)
    statistics = torch.empty(count, heads, splits, groups, 2, dtype=torch.float32, device=q.device)
    o = torch.empty_like(q)
    sizes = {
        "HEAD_DIM": head_dim,
        "WIDTH": max(16, triton.next_power_of_2(head_dim)),
        "GROUPS": groups,
    }
    _attend_slots[(splits, heads, count)](
        q, k, v, cache.k, cache.v, cache.positions, cache.buffer_k, cache.buffer_v, cache.buffer_positions, positions,
        parts, statistics, window_slots, buffer_slots, span, head_dim**-0.5 * math.log2(math.e), **sizes,
        ROWS=max(16, triton.next_power_of_2(groups)), SLOTS=_SLOTS,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    _join_and_admit[(heads, count)](
        o, parts, statistics, score, cache.k, cache.v, cache.positions, cache.score, cache.buffer_k, cache.buffer_v,
        cache.buffer_positions, cache.buffer_score, positions, window_slots, buffer_slots, sink_size, delay, splits,
        **sizes, SPLITS=triton.next_power_of_2(splits), BUFFER=triton.next_power_of_2(buffer_slots),
    )  # fmt: skip
    return o
