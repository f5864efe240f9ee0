"""One step of decoding with native sparse attention, on a cache that is updated in place.

Three launches. The first attends to shares of the means, whose logits it keeps, and of the window, and pools a block
that the new token completes. The second finds from these logits which blocks are selected, each program of a KV head
anew, which costs less than a launch of its own, and attends to a share of them. The third adds up the shares of each
branch and the new token itself, and the branches by their gates. How long each sequence is is read on the device, so
that a CUDA graph can hold a step. It reads `(length / block_size + num_blocks * block_size + window_size) * 2 *
head_dim` numbers for each sequence and KV head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.attention.triton_decode import new_token
from megahybrid_kernels.integers import cdiv, next_power_of_2, tile_width
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.native_sparse_attention.cache import NSACache
from megahybrid_kernels.native_sparse_attention.limits import FORCED_BLOCKS
from megahybrid_kernels.native_sparse_attention.triton_pool import mean_of_rows
from megahybrid_kernels.online_softmax import dot_precision, log2_scale, softmax_step, split_count
from megahybrid_kernels.rows import load_either
from megahybrid_kernels.targets import table_of

# Keys of a step of a program's loop at most, their bytes, and shares of a KV head's means and window.
_SLOTS = 64
_BYTES = 8192
_MOST_SPLITS = 128
# Programs that fill a GPU: of the first launch, and of the second, which read all of a KV head's logits each.
_PROGRAMS = 1056
_SELECTED_PROGRAMS = 264
# Logits that a program of the second holds at once.
_LOGITS = 8192
_FORCED = tl.constexpr(FORCED_BLOCKS)
_NO_KEY = tl.constexpr(-(2**63))
_LAST_BLOCK = tl.constexpr(2**31 - 1)


@triton.jit
def _pool_block(
    memory, row, mean, start,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The mean, stored, of a block from slot `start` on, whose last row is `row`, which is not in memory yet."""
    each, column = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    real = column < HEAD_DIM
    places = (start + each).to(tl.int64)[:, None] * HEAD_DIM + column[None, :]
    tile = tl.load(memory + places, mask=(each < BLOCK - 1)[:, None] & real[None, :], other=0)
    tile = tl.where((each == BLOCK - 1)[:, None], row[None, :], tile)
    pooled = mean_of_rows(tile, BLOCK, WIDTH, STEPS).to(memory.dtype.element_ty)
    tl.store(mean + (start // BLOCK).to(tl.int64) * HEAD_DIM + column, pooled, mask=real)
    return pooled.to(tl.float32)


@kernel
def _attend_split(
    q, queries, new_k, new_v, k, v, mean_k, mean_v, positions, logits, parts, statistics, splits, mean_splits,
    window_splits, heads, capacity, blocks, pitch, window_size, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, FIRST: tl.constexpr, SCORED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, CHOOSES: tl.constexpr,
):  # fmt: skip
    """Attention of a KV head's queries to a share of its means or of the cached keys in its window.

    Rows: the GROUPS of q, and from FIRST on the SCORED ones that blocks are selected by, the same where FIRST is 0.

    logits: fp32 `[sequences, kv_heads, SCORED, pitch]`, of means, in powers of two; parts: fp32 `[sequences, kv_heads,
    splits, GROUPS, HEAD_DIM]`, not normalised; statistics: fp32 `[sequences, kv_heads, splits, 2, FIRST + SCORED]`,
    peak in powers of two and sum.
    """
    each = mean_splits + window_splits
    split, sequence = tl.program_id(0) % each, tl.program_id(0) // each // heads
    pair = (tl.program_id(0) // each).to(tl.int64)
    column, row = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    real = (column < HEAD_DIM)[None, :]
    own, scored = row < GROUPS, (row >= FIRST) & (row < FIRST + SCORED)
    q_tile = tl.load(q + (pair * GROUPS + row)[:, None] * HEAD_DIM + column[None, :], mask=own[:, None] & real, other=0)
    if FIRST > 0:
        queries += (pair * SCORED - FIRST) * HEAD_DIM
        others = tl.load(queries + row[:, None] * HEAD_DIM + column[None, :], mask=scored[:, None] & real, other=0)
        q_tile = tl.where(own[:, None], q_tile, others)
    position = tl.minimum(tl.load(positions + sequence), capacity).to(tl.int32)
    k += pair * capacity * HEAD_DIM
    v += pair * capacity * HEAD_DIM
    mean_k += pair * blocks * HEAD_DIM
    mean_v += pair * blocks * HEAD_DIM

    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -1e30, tl.float32)
    if (split == 0) & ((position + 1) % BLOCK == 0):
        begin = position + 1 - BLOCK
        mask = column < HEAD_DIM
        k_row = tl.load(new_k + pair * HEAD_DIM + column, mask=mask, other=0)
        v_row = tl.load(new_v + pair * HEAD_DIM + column, mask=mask, other=0)
        k_row = _pool_block(k, k_row, mean_k, begin, HEAD_DIM, WIDTH, BLOCK, STEPS)
        v_row = _pool_block(v, v_row, mean_v, begin, HEAD_DIM, WIDTH, BLOCK, STEPS)
        peak = tl.sum(q_tile.to(tl.float32) * k_row[None, :], 1) * scale
        total += 1
        acc += v_row[None, :]

    of_means = split < mean_splits
    begin = tl.where(of_means, 0, tl.maximum(position - window_size + 1, 0))
    end = tl.where(of_means, position // BLOCK, position)
    share = tl.cdiv(tl.cdiv(end - begin, tl.where(of_means, mean_splits, window_splits)), SLOTS) * SLOTS
    first = begin + tl.where(of_means, split, split - mean_splits) * share
    end = tl.minimum(first + share, end)
    kept = (pair * SCORED + row - FIRST)[:, None] * pitch
    for start in tl.range(first, end, SLOTS, num_stages=STAGES):
        slot = start + tl.arange(0, SLOTS)
        seen = slot < end
        places = slot.to(tl.int64)[:, None] * HEAD_DIM + column[None, :]
        k_tile = load_either(mean_k, k, of_means, places, seen[:, None] & real, CHOOSES)
        v_tile = load_either(mean_v, v, of_means, places, seen[:, None] & real, CHOOSES)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        tl.store(logits + kept + slot[None, :], x, mask=scored[:, None] & (seen & of_means)[None, :])
        x = tl.where(seen[None, :], x, float("-inf"))
        acc, total, peak = softmax_step(acc, total, peak, x, v_tile, 1.0, PRECISION)

    part = pair * splits + split
    _store_part(parts, statistics, part, acc, total, peak, GROUPS, FIRST + SCORED, HEAD_DIM)


@triton.jit
def _store_part(
    parts, statistics, part, acc, total, peak, GROUPS: tl.constexpr, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr
):
    row, column = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1])
    mask = (row < GROUPS)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(parts + (part * GROUPS + row)[:, None] * HEAD_DIM + column[None, :], acc, mask=mask)
    tl.store(statistics + part * 2 * COUNT + row, peak, mask=row < COUNT)
    tl.store(statistics + (part * 2 + 1) * COUNT + row, total, mask=row < COUNT)


@triton.jit
def _lse(statistics, count, SCORED: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, SPLITS: tl.constexpr):
    """fp32 `[ROWS]` of the first `count` splits' statistics, log2 of the sums; 0 where there is nothing."""
    row, each = tl.arange(0, ROWS), tl.arange(0, SPLITS)
    mask = (row < SCORED)[:, None] & (each < count)[None, :]
    places = each[None, :] * 2 * COUNT + row[:, None]
    peaks = tl.load(statistics + places, mask=mask, other=-1e30)
    totals = tl.load(statistics + COUNT + places, mask=mask, other=0)
    peak = tl.max(peaks, 1)
    total = tl.sum(totals * tl.exp2(peaks - peak[:, None]), 1)
    return tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1)), 0)


@triton.jit
def _choose(
    logits, lse, pitch, current,
    SCORED: tl.constexpr, SLOTS: tl.constexpr, NUM_BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """int32 `[SLOTS]`, the blocks that a query of block `current` selects, in no order, then -1.

    A block's rank is its score, which is not negative, NaN above all, then its number: as whole numbers they have one
    order, in which no two are equal.
    """
    slot, row = tl.arange(0, SLOTS), tl.arange(0, lse.shape[0])
    free_slots = NUM_BLOCKS - _FORCED
    best = tl.where(slot < free_slots, -1 - slot.to(tl.int64), -(_NO_KEY + 1))
    end = tl.multiple_of(tl.cdiv(current, 16) * 16, 16)  # wide loads: what is beyond is not written, but there
    for first in range(0, current - 1, CHUNK):
        block = first + tl.arange(0, CHUNK)
        free = (block > 0) & (block < current - 1)
        places = row.to(tl.int64)[:, None] * pitch + block[None, :]
        x = tl.load(logits + places, mask=(row < SCORED)[:, None] & (block < end)[None, :], other=float("-inf"))
        score = tl.sum(tl.exp2(tl.where(free[None, :], x, float("-inf")) - lse[:, None]), 0)
        rank = ((score.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64) << 32) + (_LAST_BLOCK - block)
        rank = tl.where(free, rank, _NO_KEY)
        least, top = tl.min(best, 0), tl.max(rank, 0)
        while top > least:
            best = tl.where(best == least, top, best)
            rank = tl.where(rank == top, _NO_KEY, rank)
            least, top = tl.min(best, 0), tl.max(rank, 0)
    chosen = tl.where((best >= 0) & (slot < free_slots), _LAST_BLOCK - (best & _LAST_BLOCK), -1).to(tl.int32)
    chosen = tl.where(slot == free_slots, current, chosen)
    chosen = tl.where(slot == free_slots + 1, current - 1, chosen)  # -1 where there is none
    return tl.where(slot == free_slots + 2, tl.where(current > 1, 0, -1), chosen)


@kernel
def _attend_selected(
    q, k, v, positions, logits, parts, statistics, splits, mean_splits, before, heads, capacity, pitch, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, FIRST: tl.constexpr, SCORED: tl.constexpr,
    ROWS: tl.constexpr, SCORED_ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    EACH: tl.constexpr, SLOTS: tl.constexpr, MEAN_SPLITS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a KV head's queries to the cached keys of EACH of the selected blocks, KEYS at a time.

    Its parts and statistics, as of `_attend_split`, come after those `before`.
    """
    selected_splits = splits - before
    split, sequence = tl.program_id(0) % selected_splits, tl.program_id(0) // selected_splits // heads
    pair = (tl.program_id(0) // selected_splits).to(tl.int64)
    position = tl.minimum(tl.load(positions + sequence), capacity).to(tl.int32)

    COUNT: tl.constexpr = FIRST + SCORED
    means = statistics + pair * splits * 2 * COUNT + FIRST
    lse = _lse(means, mean_splits, SCORED, SCORED_ROWS, COUNT, MEAN_SPLITS)
    chosen = _choose(
        logits + pair * SCORED * pitch, lse, pitch, position // BLOCK, SCORED, SLOTS, NUM_BLOCKS, CHUNK
    )  # fmt: skip

    column, row = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    real = (column < HEAD_DIM)[None, :]
    mask = (row < GROUPS)[:, None] & real
    q_tile = tl.load(q + (pair * GROUPS + row)[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0)
    k += pair * capacity * HEAD_DIM
    v += pair * capacity * HEAD_DIM
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -1e30, tl.float32)
    STEPS: tl.constexpr = BLOCK // KEYS
    for n in tl.range(EACH * STEPS):
        block = tl.max(tl.where(tl.arange(0, SLOTS) == split * EACH + n // STEPS, chosen, -1), 0)
        slot = block.to(tl.int64) * BLOCK + n % STEPS * KEYS + tl.arange(0, KEYS)
        seen = (block >= 0) & (slot < position)
        places = slot[:, None] * HEAD_DIM + column[None, :]
        k_tile = tl.load(k + places, mask=seen[:, None] & real, other=0)
        v_tile = tl.load(v + places, mask=seen[:, None] & real, other=0)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        x = tl.where(seen[None, :], x, float("-inf"))
        acc, total, peak = softmax_step(acc, total, peak, x, v_tile, 1.0, PRECISION)
    _store_part(
        parts, statistics, pair * splits + before + split, acc, total, peak, GROUPS, COUNT, HEAD_DIM
    )  # fmt: skip


@triton.jit
def _branch(
    parts, statistics, count, own, own_v,
    GROUPS: tl.constexpr, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """A query's output of one branch, from its `count` parts and its own key's logit, -inf where it has none."""
    column = tl.arange(0, own_v.shape[0])
    each = tl.arange(0, SPLITS)
    peaks = tl.load(statistics + each * 2 * COUNT, mask=each < count, other=-1e30)
    totals = tl.load(statistics + (each * 2 + 1) * COUNT, mask=each < count, other=0)
    peak = tl.maximum(tl.max(peaks, 0), own)
    own = tl.exp2(own - peak)
    total = tl.sum(totals * tl.exp2(peaks - peak), 0) + own
    acc = own * own_v
    for first in range(0, count, SOME):
        some = first + tl.arange(0, SOME)
        weight = tl.exp2(tl.load(statistics + some * 2 * COUNT, mask=some < count, other=-1e30) - peak)
        mask = (some < count)[:, None] & (column < HEAD_DIM)[None, :]
        part = tl.load(parts + some[:, None] * GROUPS * HEAD_DIM + column[None, :], mask=mask, other=0)
        acc += tl.sum(part * weight[:, None], 0)
    return acc / tl.where(total > 0, total, 1)  # of no block: 0


@kernel
def _join_and_append(
    o, q, new_k, new_v, gates, k, v, positions, parts, statistics, splits, mean_splits, window_splits, query_heads,
    capacity, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, COUNT: tl.constexpr, MEAN_SPLITS: tl.constexpr,
    WINDOW_SPLITS: tl.constexpr, SELECTED_SPLITS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """A query head's output from its parts and its own token, always added in the same order."""
    head, sequence = tl.program_id(0) % query_heads, tl.program_id(0) // query_heads
    query, pair, column, real, k_row, v_row, own = new_token(q, new_k, new_v, scale, HEAD_DIM, WIDTH, GROUPS)
    own_v = v_row.to(tl.float32)

    parts += (pair * splits * GROUPS + query % GROUPS) * HEAD_DIM
    statistics += pair * splits * 2 * COUNT + query % GROUPS
    compressed = _branch(
        parts, statistics, mean_splits, float("-inf"), own_v, GROUPS, COUNT, HEAD_DIM, MEAN_SPLITS, SOME
    )  # fmt: skip
    parts += mean_splits * GROUPS * HEAD_DIM
    statistics += mean_splits * 2 * COUNT
    near = _branch(parts, statistics, window_splits, own, own_v, GROUPS, COUNT, HEAD_DIM, WINDOW_SPLITS, SOME)
    parts += window_splits * GROUPS * HEAD_DIM
    statistics += window_splits * 2 * COUNT
    selected_splits = splits - mean_splits - window_splits
    selected = _branch(parts, statistics, selected_splits, own, own_v, GROUPS, COUNT, HEAD_DIM, SELECTED_SPLITS, SOME)

    gates += query * 3
    y = tl.load(gates).to(tl.float32) * compressed
    y += tl.load(gates + 1).to(tl.float32) * selected
    y += tl.load(gates + 2).to(tl.float32) * near
    tl.store(o + query * HEAD_DIM + column, y.to(o.dtype.element_ty), mask=real)
    if head % GROUPS == 0:
        slot = pair * capacity + tl.load(positions + sequence)
        tl.store(k + slot * HEAD_DIM + column, k_row, mask=real)
        tl.store(v + slot * HEAD_DIM + column, v_row, mask=real)


def native_sparse_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    cache: NSACache,
    positions: Tensor,
    num_blocks: int,
    window_size: int,
    queries: Tensor | None = None,
) -> Tensor:
    """One new token of every sequence: its attention, and the memory of `cache` with it.

    Args:
        q: `[sequences, query_heads, head_dim]`; k, v: `[sequences, kv_heads, head_dim]`; gates: `[sequences,
            query_heads, 3]`, of the new tokens.
        cache: with room for one more, into which it may write.
        positions: int64 `[sequences]`, on the device, of the new tokens.
        num_blocks, window_size, queries: as for `native_sparse_attention_with_cache`.

    Returns:
        `[sequences, query_heads, head_dim]` in q's dtype.
    """
    cached_k, cached_v, mean_k, mean_v = cache.room.rows
    count, heads, capacity, head_dim = cached_k.shape
    blocks, groups = mean_k.shape[2], q.shape[1] // heads
    q, k, v, gates = (x.contiguous() for x in (q, k, v, gates))
    queries = q if queries is None else queries.contiguous()
    first, scored = (0 if queries is q else groups), queries.shape[1] // heads

    slots = max(16, min(_SLOTS, _BYTES // (tile_width(head_dim) * q.element_size())))
    splits = split_count(count * heads, blocks + window_size, slots, _PROGRAMS, _MOST_SPLITS)
    mean_splits = max(1, splits * blocks // (blocks + window_size))
    window_splits = max(1, splits - mean_splits)
    each = cdiv(num_blocks, split_count(count * heads, num_blocks, 1, _SELECTED_PROGRAMS, num_blocks))
    selected_splits = cdiv(num_blocks, each)
    before = mean_splits + window_splits
    splits = before + selected_splits

    fp32 = {"dtype": torch.float32, "device": q.device}
    pitch = cdiv(blocks, 16) * 16
    logits = torch.empty(count, heads, scored, pitch, **fp32)
    parts = torch.empty(count, heads, splits, groups, head_dim, **fp32)
    statistics = torch.empty(count, heads, splits, 2, first + scored, **fp32)
    o = torch.empty_like(q)
    scale, precision = log2_scale(head_dim), dot_precision(q.dtype)
    rows = {"HEAD_DIM": head_dim, "WIDTH": tile_width(head_dim), "GROUPS": groups}
    scored_rows = tile_width(scored)
    _attend_split[before * heads * count](
        q, queries, k, v, cached_k, cached_v, mean_k, mean_v, positions, logits, parts, statistics, splits,
        mean_splits, window_splits, heads, capacity, blocks, pitch, window_size, scale, **rows, FIRST=first,
        SCORED=scored, ROWS=tile_width(first + scored), BLOCK=cache.block_size,
        STEPS=cache.block_size.bit_length() - 1, SLOTS=slots, PRECISION=precision, STAGES=3,
        CHOOSES=table_of(q.device).chooses, num_warps=4,
    )  # fmt: skip
    _attend_selected[selected_splits * heads * count](
        q, cached_k, cached_v, positions, logits, parts, statistics, splits, mean_splits, before, heads, capacity,
        pitch, scale, **rows, FIRST=first, SCORED=scored, ROWS=tile_width(groups), SCORED_ROWS=scored_rows,
        BLOCK=cache.block_size, KEYS=min(cache.block_size, slots), NUM_BLOCKS=num_blocks, EACH=each,
        SLOTS=next_power_of_2(num_blocks), MEAN_SPLITS=next_power_of_2(mean_splits),
        CHUNK=max(16, _LOGITS // scored_rows), PRECISION=precision, num_warps=4,
    )  # fmt: skip
    _join_and_append[groups * heads * count](
        o, q, k, v, gates, cached_k, cached_v, positions, parts, statistics, splits, mean_splits, window_splits,
        groups * heads, capacity, scale, **rows, COUNT=first + scored, MEAN_SPLITS=next_power_of_2(mean_splits),
        WINDOW_SPLITS=next_power_of_2(window_splits), SELECTED_SPLITS=next_power_of_2(selected_splits), SOME=16,
        num_warps=4,
    )  # fmt: skip
    return o
