"""One step of decoding with full or sliding-window attention, on a cache that is updated in place.

Two launches: the cached keys of a KV head are split over programs, then the splits and the new token itself are added
up and the new token enters the cache. How long each sequence is is read on the device, so that a CUDA graph can hold a
step. Bytes are those of the cached keys and values, `2 * kv_heads * head_dim` numbers a token, which bound it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.integers import next_power_of_2, tile_width
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.online_softmax import dot_precision, log2_scale, softmax_step, split_count
from megahybrid_kernels.targets import CDNA3, table_of

_SLOTS = 64
# Bytes of a step's keys on AMD's GPUs, whose shared memory also has two steps of values.
_BYTES = 8192
_MOST_SPLITS = 128
# Programs that fill a GPU of some hundred multiprocessors with several each.
_PROGRAMS = 1056


@kernel
def _attend_split(
    q, k, v, positions, parts, statistics, splits, heads, capacity, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of a KV head's queries to an even share of its cached keys.

    parts: fp32 `[sequences, query_heads, splits, HEAD_DIM]`, not normalised; statistics: fp32 `[sequences, query_heads,
    2, splits]`, peak in powers of two and sum.
    """
    split, sequence = tl.program_id(0) % splits, tl.program_id(0) // splits // heads
    pair = (tl.program_id(0) // splits).to(tl.int64)
    column, row = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    real = (column < HEAD_DIM)[None, :]
    rows_mask = (row < GROUPS)[:, None] & real
    q_tile = tl.load(q + (pair * GROUPS + row)[:, None] * HEAD_DIM + column[None, :], mask=rows_mask, other=0)
    position = tl.load(positions + sequence)
    held = tl.minimum(position, capacity).to(tl.int32)
    replaced = (position % capacity).to(tl.int32)  # in a ring that is full, the oldest token, out of sight by now
    span = tl.cdiv(tl.cdiv(held, splits), SLOTS) * SLOTS
    first = split * span
    end = tl.minimum(first + span, held)
    k += pair * capacity * HEAD_DIM
    v += pair * capacity * HEAD_DIM

    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -1e30, tl.float32)
    for start in tl.range(first, end, SLOTS, num_stages=STAGES):
        slot = start + tl.arange(0, SLOTS)
        places = slot.to(tl.int64)[:, None] * HEAD_DIM + column[None, :]
        mask = (slot < end)[:, None] & real
        k_tile = tl.load(k + places, mask=mask, other=0)
        v_tile = tl.load(v + places, mask=mask, other=0)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        visible = (slot < end) & (slot != replaced)
        logits = tl.where(visible[None, :], logits * scale, float("-inf"))
        acc, total, peak = softmax_step(acc, total, peak, logits, v_tile, 1.0, PRECISION)

    query = pair * GROUPS + row
    tl.store(parts + (query * splits + split)[:, None] * HEAD_DIM + column[None, :], acc, mask=rows_mask)
    tl.store(statistics + query * 2 * splits + split, peak, mask=row < GROUPS)
    tl.store(statistics + (query * 2 + 1) * splits + split, total, mask=row < GROUPS)


@triton.jit
def new_token(q, new_k, new_v, scale, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Of the query head that the program owns: its number, that of its KV head, columns and which are real, the new
    token's key and value, and the query's logit of that key."""
    query = tl.program_id(0).to(tl.int64)
    pair = query // GROUPS  # query heads are a multiple of GROUPS a sequence
    column = tl.arange(0, WIDTH)
    real = column < HEAD_DIM
    k_row = tl.load(new_k + pair * HEAD_DIM + column, mask=real, other=0)
    v_row = tl.load(new_v + pair * HEAD_DIM + column, mask=real, other=0)
    q_row = tl.load(q + query * HEAD_DIM + column, mask=real, other=0)
    own = tl.sum(q_row.to(tl.float32) * k_row.to(tl.float32), 0) * scale
    return query, pair, column, real, k_row, v_row, own


@kernel
def _join_and_append(
    o, q, new_k, new_v, k, v, positions, parts, statistics, query_heads, capacity, splits, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A query head's output from its splits and its own token, always added in the same order."""
    head, sequence = tl.program_id(0) % query_heads, tl.program_id(0) // query_heads
    query, pair, column, real, k_row, v_row, own = new_token(q, new_k, new_v, scale, HEAD_DIM, WIDTH, GROUPS)

    statistics += query * 2 * splits
    each = tl.arange(0, SPLITS)
    peaks = tl.load(statistics + each, mask=each < splits, other=-1e30)
    totals = tl.load(statistics + splits + each, mask=each < splits, other=0)
    peak = tl.maximum(tl.max(peaks, 0), own)
    own = tl.exp2(own - peak)
    total = tl.sum(totals * tl.exp2(peaks - peak), 0) + own
    acc = own * v_row.to(tl.float32)
    parts += query * splits * HEAD_DIM
    for first in range(0, splits, BLOCK):
        some = first + tl.arange(0, BLOCK)
        weight = tl.exp2(tl.load(statistics + some, mask=some < splits, other=-1e30) - peak)
        mask = (some < splits)[:, None] & real[None, :]
        part = tl.load(parts + some[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0)
        acc += tl.sum(part * weight[:, None], 0)
    tl.store(o + query * HEAD_DIM + column, (acc / total).to(o.dtype.element_ty), mask=real)
    if head % GROUPS == 0:
        slot = pair * capacity + tl.load(positions + sequence) % capacity
        tl.store(k + slot * HEAD_DIM + column, k_row, mask=real)
        tl.store(v + slot * HEAD_DIM + column, v_row, mask=real)


def attention_step(q: Tensor, new_k: Tensor, new_v: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """One new token of every sequence: its attention to itself and the cached ones, and its place in the cache.

    Slot = position % capacity: a window's ring where the capacity is its size, else a cache that has room for more.

    Args:
        q: `[sequences, query_heads, head_dim]`; new_k, new_v: `[sequences, kv_heads, head_dim]`, of the new tokens.
        k, v: `[sequences, kv_heads, capacity, head_dim]`, contiguous, updated in place.
        positions: int64 `[sequences]`, on the device, of the new tokens.

    Returns:
        `[sequences, query_heads, head_dim]` in q's dtype.
    """
    count, heads, capacity, head_dim = k.shape
    query_heads = q.shape[1]
    groups = query_heads // heads
    q, new_k, new_v = (x.contiguous() for x in (q, new_k, new_v))
    width, slots = tile_width(head_dim), _SLOTS
    if table_of(q.device) is CDNA3:
        slots = max(16, min(slots, _BYTES // (width * q.element_size())))
    splits = split_count(count * heads, capacity, slots, _PROGRAMS, _MOST_SPLITS)
    parts = torch.empty(count, query_heads, splits, head_dim, dtype=torch.float32, device=q.device)
    statistics = torch.empty(count, query_heads, 2, splits, dtype=torch.float32, device=q.device)
    o = torch.empty_like(q)
    scale = log2_scale(head_dim)
    _attend_split[splits * heads * count](
        q, k, v, positions, parts, statistics, splits, heads, capacity, scale, HEAD_DIM=head_dim, WIDTH=width,
        GROUPS=groups, ROWS=tile_width(groups), SLOTS=slots,
        PRECISION=dot_precision(q.dtype), STAGES=3 if head_dim <= 128 else 2, num_warps=4,
    )  # fmt: skip
    _join_and_append[query_heads * count](
        o, q, new_k, new_v, k, v, positions, parts, statistics, query_heads, capacity, splits, scale,
        HEAD_DIM=head_dim, WIDTH=width, GROUPS=groups, SPLITS=next_power_of_2(splits), BLOCK=32, num_warps=4,
    )  # fmt: skip
    return o
