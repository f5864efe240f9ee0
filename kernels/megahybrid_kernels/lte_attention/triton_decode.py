"""One step of decoding under learnable token eviction: attention over window and buffer, then the buffer's update.

One launch a step, or two where there are few sequences and a head's slots are split over programs. Their shapes depend
on nothing in the data, so that a CUDA graph can hold them. The cache is updated in place, and nothing of it is copied
but the one row that enters the buffer. A step costs the bytes of `(window + 1 + buffer) * 2 * head_dim` numbers for
each sequence and KV head, however long the context is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.integers import cdiv, next_power_of_2, tile_width
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.lte_attention.cache import LTECache
from megahybrid_kernels.online_softmax import dot_precision, log2_scale, softmax_step, split_count
from megahybrid_kernels.rows import load_either
from megahybrid_kernels.targets import table_of

# Slots of a step of a program's loop, and the programs that keep a GPU busy: with fewer heads over all sequences, a
# head's slots are split.
_SLOTS = 64
_PROGRAMS = 512
_MOST_SPLITS = 64


@kernel
def _attend_slots(
    q, k, v, ring_k, ring_v, ring_positions, buffer_k, buffer_v, buffer_positions, positions, o, parts, statistics,
    late_score, ring_score, buffer_score, splits, heads, window_slots, buffer_slots, sinks, delay, span, scale,
    v_stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    BUFFER: tl.constexpr, SLOTS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, CHOOSES: tl.constexpr,
):  # fmt: skip
    """Attention of a KV head's queries to `span` of its slots, buffer first; writes the new token into the ring.

    If WHOLE these are all slots: writes o, then `_admit`. Else parts: fp32 `[sequences, kv_heads, splits, GROUPS,
    HEAD_DIM]`, not normalised; statistics: the same without head dim but with (peak in powers of two, sum).
    """
    split, pair = tl.program_id(0) % splits, tl.program_id(0) // splits
    head, sequence = pair % heads, pair // heads
    pair = pair.to(tl.int64)
    column, row = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    real = column < HEAD_DIM
    rows_mask = (row < GROUPS)[:, None] & real[None, :]
    q_tile = tl.load(q + (pair * GROUPS + row)[:, None] * HEAD_DIM + column[None, :], mask=rows_mask, other=0)
    position = tl.load(positions + sequence)
    new_slot = (position % window_slots).to(tl.int32)
    new_k = tl.load(k + pair * HEAD_DIM + column, mask=real, other=0)
    new_v = tl.load(v + sequence.to(tl.int64) * v_stride + head * HEAD_DIM + column, mask=real, other=0)

    # The new token itself is the first split's first key; what its slot holds is older than the window.
    own = split == 0
    logit = tl.sum(q_tile.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
    peak = tl.where(own, logit, -1e30)
    total = tl.where(own, 1.0, tl.zeros([ROWS], tl.float32))
    acc = tl.where(own, new_v.to(tl.float32)[None, :], tl.zeros([ROWS, WIDTH], tl.float32))
    first = split * span
    end = tl.minimum(first + span, buffer_slots + window_slots)
    buffer_k += pair * buffer_slots * HEAD_DIM
    buffer_v += pair * buffer_slots * HEAD_DIM
    ring_k += pair * window_slots * HEAD_DIM
    ring_v += pair * window_slots * HEAD_DIM
    for start in tl.range(first, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        in_buffer, in_ring = (slot < buffer_slots) & (slot < end), (slot >= buffer_slots) & (slot < end)
        ring_slot = slot - buffer_slots
        held = tl.load(buffer_positions + pair * buffer_slots + slot, mask=in_buffer, other=-1)
        recent = tl.load(ring_positions + sequence.to(tl.int64) * window_slots + ring_slot, mask=in_ring, other=-1)
        visible = (held >= 0) | ((recent >= 0) & (ring_slot != new_slot))
        mask = (slot < end)[:, None] & real[None, :]
        places = tl.where(in_buffer, slot, ring_slot).to(tl.int64)[:, None] * HEAD_DIM + column[None, :]
        k_tile = load_either(buffer_k, ring_k, in_buffer[:, None], places, mask, CHOOSES)
        v_tile = load_either(buffer_v, ring_v, in_buffer[:, None], places, mask, CHOOSES)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        logits = tl.where(visible[None, :], logits, float("-inf"))
        # Slots that never held a token may hold anything.
        v_tile = tl.where(visible[:, None], v_tile, 0)
        acc, total, peak = softmax_step(acc, total, peak, logits, v_tile, scale, PRECISION)

    new_place = new_slot.to(tl.int64) * HEAD_DIM + column
    tl.store(ring_k + new_place, new_k, mask=real & own)
    tl.store(ring_v + new_place, new_v, mask=real & own)
    if WHOLE:
        places = (pair * GROUPS + row)[:, None] * HEAD_DIM + column[None, :]
        tl.store(o + places, (acc / total[:, None]).to(o.dtype.element_ty), mask=rows_mask)
        tl.debug_barrier()  # all of the buffer has been read
        _admit(
            late_score, ring_k, ring_v, ring_positions, ring_score, buffer_k, buffer_v, buffer_positions, buffer_score,
            position, sequence, head, pair, window_slots, buffer_slots, sinks, delay, HEAD_DIM, WIDTH, BUFFER,
        )  # fmt: skip
    else:
        out = (pair * splits + split) * GROUPS + row
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

    ring_k, ring_v, buffer_k and buffer_v are those of the pair, the others of all. A free slot is taken first, else the
    least score is displaced iff it is less, among equal ones the youngest.
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
    source, target = leaving_slot * HEAD_DIM + column, loser * HEAD_DIM + column
    tl.store(buffer_k + target, tl.load(ring_k + source, mask=mask, other=0), mask=mask)
    tl.store(buffer_v + target, tl.load(ring_v + source, mask=mask, other=0), mask=mask)
    tl.store(buffer_positions + place, leaving, mask=enters)
    tl.store(buffer_score + place, score, mask=enters)


@kernel
def _join_and_admit(
    o, parts, statistics, late_score, ring_k, ring_v, ring_positions, ring_score, buffer_k, buffer_v,
    buffer_positions, buffer_score, positions, heads, window_slots, buffer_slots, sinks, delay, splits,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr, BUFFER: tl.constexpr,
):  # fmt: skip
    """Adds up the splits of a KV head's queries, always in the same order; then `_admit`."""
    head, sequence = tl.program_id(0) % heads, tl.program_id(0) // heads
    pair = tl.program_id(0).to(tl.int64)
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
    ring, buffer = pair * window_slots * HEAD_DIM, pair * buffer_slots * HEAD_DIM
    _admit(
        late_score, ring_k + ring, ring_v + ring, ring_positions, ring_score, buffer_k + buffer, buffer_v + buffer,
        buffer_positions, buffer_score, tl.load(positions + sequence), sequence, head, pair, window_slots,
        buffer_slots, sinks, delay, HEAD_DIM, WIDTH, BUFFER,
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
    q, k, score = (x.contiguous() for x in (q, k, score))
    v = v if v[0].is_contiguous() else v.contiguous()  # rows may lie apart, as those of a product with others do
    slots = window_slots + buffer_slots
    splits = split_count(count * heads, slots, _SLOTS, _PROGRAMS, _MOST_SPLITS)
    span = cdiv(cdiv(slots, splits), _SLOTS) * _SLOTS
    splits = cdiv(slots, span)
    o = torch.empty_like(q)
    parts = statistics = o
    if splits > 1:
        parts = torch.empty(count, heads, splits, groups, head_dim, dtype=torch.float32, device=q.device)
        statistics = torch.empty(count, heads, splits, groups, 2, dtype=torch.float32, device=q.device)
    sizes = {
        "HEAD_DIM": head_dim,
        "WIDTH": tile_width(head_dim),
        "GROUPS": groups,
        "BUFFER": next_power_of_2(buffer_slots),
    }
    chooses = table_of(q.device).chooses
    # Keys of more slots and warps' share of them would not stay in registers, where two loads of each have to.
    wide = 2 if head_dim > (128 if chooses else 64) else 1
    _attend_slots[splits * heads * count](
        q, k, v, cache.k, cache.v, cache.positions, cache.buffer_k, cache.buffer_v, cache.buffer_positions, positions,
        o, parts, statistics, score, cache.score, cache.buffer_score, splits, heads, window_slots, buffer_slots,
        sink_size, delay, span, log2_scale(head_dim), v.stride(0), **sizes,
        ROWS=tile_width(groups), SLOTS=_SLOTS // wide, WHOLE=splits == 1, PRECISION=dot_precision(q.dtype),
        CHOOSES=chooses, num_warps=2 * wide,
    )  # fmt: skip
    if splits > 1:
        _join_and_admit[heads * count](
            o, parts, statistics, score, cache.k, cache.v, cache.positions, cache.score, cache.buffer_k,
            cache.buffer_v, cache.buffer_positions, cache.buffer_score, positions, heads, window_slots, buffer_slots,
            sink_size, delay, splits, **sizes, SPLITS=next_power_of_2(splits),
        )  # fmt: skip
    return o
