"""Gradients of gates and queries: by tile of queries, over the keys and means that they see.

With branches b, o = sum_b g_b o_b. The gradient of o_b is g_b do, which is never written: as

    dg_b = <do, o_b>        p'_b = g_b p_b        ds_b = p'_b (<do, v> - dg_b)        dv = sum_b p'_b do

`softmax_gradients` serves each branch with its gate in the log-denominators, lse_b - log2(g_b), and with dg_b as delta.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megahybrid_kernels.launch import kernel
from megahybrid_kernels.native_sparse_attention.triton_score import query_rows
from megahybrid_kernels.rows import load_all_rows, load_rows, store_rows
from megahybrid_kernels.softmax_gradients import query_step


@triton.jit
def _has_near_blocks(
    selection, begins, row, inside, heads, GROUPS: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Whether each row's list holds its token's own block and the one before, which the kernels take for granted."""
    pair, slot = row // GROUPS, tl.arange(0, SLOTS)
    mask = inside[:, None] & (slot < NUM_BLOCKS)[None, :]
    n = tl.load(selection + (pair * NUM_BLOCKS)[:, None] + slot[None, :], mask=mask, other=-1)
    token = pair // heads
    current = (token - tl.load(begins + token, mask=inside, other=0)) // BLOCK
    near = (n >= tl.maximum(current - 1, 0)[:, None]).to(tl.int32)
    return tl.sum(near, 1) == tl.minimum(current, 1) + 1


@triton.jit
def _prepare_branch(
    do, o, lse, gates, dgates, statistics, row, inside, known, BRANCH: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    o_tile = load_rows(o, row, inside, HEAD_DIM, 0, HEAD_DIM, WIDTH)
    dgate = tl.sum(do * o_tile.to(tl.float32), 1)
    gate = tl.load(gates + row * 3 + BRANCH, mask=inside, other=1).to(tl.float32)
    total = tl.load(lse + row, mask=inside, other=0) - tl.log2(gate)
    total = tl.where(known, total, float("nan"))
    tl.store(dgates + row * 3 + BRANCH, dgate.to(dgates.dtype.element_ty), mask=inside)
    tl.store(statistics + row[:, None] * 2 + tl.arange(0, 2)[None, :], tl.join(total, dgate), mask=inside[:, None])


@kernel
def prepare_kernel(
    do, o_compressed, o_selected, o_window, lse_compressed, lse_selected, lse_window, gates, selection, begins, dgates,
    statistics_compressed, statistics_selected, statistics_window, rows, heads,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dgates, and of each branch fp32 `[rows, 2]` for the kernels after it: log-denominator with its gate, and delta.

    All contiguous; rows are pairs of a token and a query head. A gate of 0 makes a log-denominator inf; a negative one,
    or a selection without near blocks, NaN, and so all gradients that it enters.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    do_tile = load_rows(do, row, inside, HEAD_DIM, 0, HEAD_DIM, WIDTH).to(tl.float32)
    _prepare_branch(
        do_tile, o_compressed, lse_compressed, gates, dgates, statistics_compressed, row, inside, inside, 0,
        HEAD_DIM, WIDTH,
    )  # fmt: skip
    known = _has_near_blocks(selection, begins, row, inside, heads, GROUPS, BLOCK, NUM_BLOCKS, SLOTS)
    _prepare_branch(
        do_tile, o_selected, lse_selected, gates, dgates, statistics_selected, row, inside, known, 1,
        HEAD_DIM, WIDTH,
    )  # fmt: skip
    _prepare_branch(
        do_tile, o_window, lse_window, gates, dgates, statistics_window, row, inside, inside, 2, HEAD_DIM, WIDTH
    )  # fmt: skip


@triton.jit
def load_statistics(statistics, places, inside, MASKED: tl.constexpr):
    """Log-denominator and delta of each row; a row outside gets p = 0.

    Loaded as one tile, Triton copies each of them once; as two vectors, once for every thread that reads them.
    """
    which = tl.arange(0, 2)
    pointers = statistics + places[:, None] * 2 + which[None, :]
    if MASKED:
        pair = tl.load(pointers, mask=inside[:, None], other=tl.where(which == 0, float("inf"), 0.0)[None, :])
    else:
        pair = tl.load(pointers)
    return tl.split(pair)


@triton.jit
def _band_step(
    dq, q, do, k, v, causal, in_window, selected_total, selected_delta, window_total, window_delta, scale,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`query_step` of the selected and the window branch at once."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    p_selected = tl.where(causal, tl.exp2(logits - selected_total[:, None]), 0.0)
    p_window = tl.where(in_window, tl.exp2(logits - window_total[:, None]), 0.0)
    ds = p_selected * (dp - selected_delta[:, None]) + p_window * (dp - window_delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@kernel
def query_gradient_kernel(
    q, k, v, pooled_k, pooled_v, do, dq, statistics_compressed, statistics_selected, statistics_window,
    blocks, members, counts, firsts, begins, ends, blocks_before, k_stride, k_head_stride, v_stride, v_head_stride,
    heads, window, scale, softmax_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, CAPACITY: tl.constexpr, STEP: tl.constexpr, POOLED_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a tile, STEP keys of a block or POOLED_STEP means at a time.

    q, do and dq are contiguous; blocks, members and counts are of `triton_union.Union`. Its last two blocks, the tile's
    own and the one before, are the band that all rows select and, as far as it reaches, have in their window; one
    product serves both branches.
    """
    ROWS: tl.constexpr = TOKENS * HEADS
    PARTS: tl.constexpr = BLOCK // STEP
    tile, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    i0 = tl.load(firsts + tile)
    begin, end = tl.load(begins + i0), tl.load(ends + i0)
    token, row, _, inside = query_rows(i0, end, 0, end, head, heads, GROUPS, HEADS, TOKENS)
    q_tile = load_rows(q, row, inside, HEAD_DIM, 0, HEAD_DIM, WIDTH)
    do_tile = load_rows(do, row, inside, HEAD_DIM, 0, HEAD_DIM, WIDTH)
    # Rows that do not exist get p = 0.
    selected_total, selected_delta = load_statistics(statistics_selected, row, inside, True)
    pooled_stride = heads * HEAD_DIM
    first_pooled = (tl.load(blocks_before + i0).to(tl.int64) * heads + head) * HEAD_DIM
    pooled_k += first_pooled
    pooled_v += first_pooled
    k += begin.to(tl.int64) * k_stride + head * k_head_stride
    v += begin.to(tl.int64) * v_stride + head * v_head_stride
    position = token - begin
    last = tl.minimum(i0 + TOKENS, end) - 1 - begin
    current = (i0 - begin) // BLOCK
    lane = tl.arange(0, STEP)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    unmasked = inside[:, None]

    joint = tl.program_id(0).to(tl.int64) * CAPACITY
    far = tl.load(counts + tl.program_id(0)) - tl.minimum(current + 1, 2)
    block = tl.load(blocks + joint, mask=far > 0, other=0)
    for e in tl.range(0, far * PARTS):
        j0 = tl.cast(block * BLOCK + e % PARTS * STEP, tl.int64)
        seen = ((tl.load(members + joint + e // PARTS) >> (token - i0)) & 1) > 0
        k_tile = load_all_rows(k + j0 * k_stride, lane, k_stride, HEAD_DIM, WIDTH)
        v_tile = load_all_rows(v + j0 * v_stride, lane, v_stride, HEAD_DIM, WIDTH)
        # A turn ahead, so that the loads of a block do not wait for its number.
        block = tl.load(blocks + joint + (e + 1) // PARTS, mask=e + 1 < far * PARTS, other=0)
        row_total = tl.where(seen, selected_total, float("inf"))
        acc = query_step(
            acc, q_tile, do_tile, k_tile, v_tile, row_total, selected_delta, unmasked, scale, False, PRECISION
        )  # fmt: skip

    window_total, window_delta = load_statistics(statistics_window, row, inside, True)
    band = tl.maximum(current - 1, 0) * BLOCK
    first = tl.minimum(tl.maximum(i0 - begin - window + 1, 0) // STEP * STEP, band)
    inner = tl.minimum(tl.cdiv(tl.maximum(last - window + 1, 0), STEP) * STEP, band)
    for j0 in tl.range(inner, band, STEP):
        k_tile = load_all_rows(k + tl.cast(j0, tl.int64) * k_stride, lane, k_stride, HEAD_DIM, WIDTH)
        v_tile = load_all_rows(v + tl.cast(j0, tl.int64) * v_stride, lane, v_stride, HEAD_DIM, WIDTH)
        acc = query_step(
            acc, q_tile, do_tile, k_tile, v_tile, window_total, window_delta, unmasked, scale, False, PRECISION
        )  # fmt: skip
    for j0 in tl.range(first, inner, STEP):
        j = j0 + lane
        k_tile = load_all_rows(k, j, k_stride, HEAD_DIM, WIDTH)
        v_tile = load_all_rows(v, j, v_stride, HEAD_DIM, WIDTH)
        visible = position[:, None] - j[None, :] < window
        acc = query_step(
            acc, q_tile, do_tile, k_tile, v_tile, window_total, window_delta, visible, scale, True, PRECISION
        )  # fmt: skip
    for j0 in tl.range(band, last + 1, STEP):
        j = j0 + lane
        k_tile = load_rows(k, j.to(tl.int64), j <= last, k_stride, 0, HEAD_DIM, WIDTH)
        v_tile = load_rows(v, j.to(tl.int64), j <= last, v_stride, 0, HEAD_DIM, WIDTH)
        distance = position[:, None] - j[None, :]
        acc = _band_step(
            acc, q_tile, do_tile, k_tile, v_tile, distance >= 0, (distance >= 0) & (distance < window),
            selected_total, selected_delta, window_total, window_delta, scale, PRECISION,
        )  # fmt: skip

    pooled_total, pooled_delta = load_statistics(statistics_compressed, row, inside, True)
    pooled_lane = tl.arange(0, POOLED_STEP)
    # All rows see the blocks before their own; their own is complete for its last token alone.
    inner = current // POOLED_STEP * POOLED_STEP
    for n0 in tl.range(0, inner, POOLED_STEP):
        place = tl.cast(n0, tl.int64) * pooled_stride
        k_tile = load_all_rows(pooled_k + place, pooled_lane, pooled_stride, HEAD_DIM, WIDTH)
        v_tile = load_all_rows(pooled_v + place, pooled_lane, pooled_stride, HEAD_DIM, WIDTH)
        acc = query_step(
            acc, q_tile, do_tile, k_tile, v_tile, pooled_total, pooled_delta, unmasked, scale, False, PRECISION
        )  # fmt: skip
    complete = (last + 1) // BLOCK
    for n0 in tl.range(inner, complete, POOLED_STEP):
        n = n0 + pooled_lane
        k_tile = load_rows(pooled_k, n.to(tl.int64), n < complete, pooled_stride, 0, HEAD_DIM, WIDTH)
        v_tile = load_rows(pooled_v, n.to(tl.int64), n < complete, pooled_stride, 0, HEAD_DIM, WIDTH)
        visible = n[None, :] < ((position + 1) // BLOCK)[:, None]
        acc = query_step(
            acc, q_tile, do_tile, k_tile, v_tile, pooled_total, pooled_delta, visible, scale, True, PRECISION
        )  # fmt: skip
    store_rows(dq, acc * softmax_scale, row, inside, HEAD_DIM, 0, HEAD_DIM, WIDTH)
