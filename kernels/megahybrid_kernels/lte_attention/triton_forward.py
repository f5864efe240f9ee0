"""Forward kernel of attention under learnable token eviction.

A program owns a tile of query rows: QUERIES tokens times PACK query heads of one KV head, so that grouped heads share
every load of keys and values. It walks the tile's far columns through their list and its near keys in place, with one
online softmax over both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megahybrid_kernels.launch import kernel
from megahybrid_kernels.lte_attention.triton_columns import near_begin
from megahybrid_kernels.online_softmax import softmax_step
from megahybrid_kernels.rows import load_all_rows, load_rows, packed_rows


@triton.jit
def near_tiles(i0, i1, window, begins, ends, KEYS: tl.constexpr, STEP: tl.constexpr):
    """Near keys of the query tile [i0, i1): where they begin, and the part in between that every row sees all of."""
    begin, end = tl.load(begins + i0), tl.load(ends + i0)
    first = tl.maximum(near_begin(i0, window, KEYS), begin // STEP * STEP)
    inner = tl.maximum(i1 - 1 - window, begin) + STEP - 1
    inner = tl.maximum(inner // STEP * STEP, first)
    inner_end = tl.maximum((i0 + 1) // STEP * STEP, inner)
    # In a tile that holds a border of documents every key needs the mask.
    one_document = end >= i1
    return first, tl.where(one_document, inner, first), tl.where(one_document, inner_end, first)


@triton.jit
def edge_tiles(far_rest, first, inner, inner_end, i1, STEP: tl.constexpr):
    """How many tiles of keys need a mask: the rest of the far list, then the near keys before and after the inner."""
    return tl.cdiv(far_rest, STEP) + (inner - first) // STEP + tl.cdiv(i1 - inner_end, STEP)


@triton.jit
def edge_keys(edge, far, full, count, first, inner, inner_end, i1, STEP: tl.constexpr):
    """Keys of one of these tiles, and which of them are meant."""
    lane = tl.arange(0, STEP)
    near = edge - tl.cdiv(count - full, STEP)
    c = full + edge * STEP + lane
    column = tl.load(far + c, mask=c < count, other=0)
    left = first + near * STEP
    near_key = tl.where(left < inner, left, left - inner + inner_end) + lane
    return tl.where(near < 0, column, near_key), tl.where(near < 0, c < count, near_key < i1)


@triton.jit
def _attend(
    acc, total, peak, q, k, v, visible, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """`softmax_step` for a tile of keys; `visible` matters only if MASKED."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    return softmax_step(acc, total, peak, logits, v, scale, PRECISION)


@kernel
def forward_kernel(
    q, k, v, o, log_total, until, begins, ends, tile_lists, tile_first, tile_full, tile_count,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, tokens, window, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PACK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale q k^T, masked) v, and log2 of the softmax's denominator for the backward.

    q `[tokens, query_heads, HEAD_DIM]`; k, v `[tokens, kv_heads, HEAD_DIM]`; o as q, contiguous; log_total fp32
    `[kv_heads, tokens, query_heads / kv_heads]`. `scale` is head_dim ** -0.5 * log2(e). Accumulators are fp32; the
    probabilities are rounded to v's dtype for their product with v. Every row sees at least itself.
    """
    ROWS: tl.constexpr = QUERIES * PACK
    # The last tiles of a document see the most: they go first.
    tiles = tl.cdiv(tokens, QUERIES)
    tile, pack = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, group = (pack // GROUPS).to(tl.int64), pack % GROUPS
    i0 = tile * QUERIES
    i1 = tl.minimum(i0 + QUERIES, tokens)
    token, member, inside = packed_rows(i0, tokens, group, ROWS, PACK)
    query_head = head * (GROUPS * PACK) + member
    column = tl.arange(0, WIDTH)
    q_mask = inside[:, None] & (column < HEAD_DIM)[None, :]
    q_rows = token.to(tl.int64) * q_stride + query_head * q_head_stride
    q_tile = tl.load(q + q_rows[:, None] + column[None, :], mask=q_mask, other=0)
    k += head * k_head_stride
    v += head * v_head_stride
    until += head * tokens

    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    # Finite, so that a row that has seen nothing yet does not turn into NaN.
    peak = tl.full([ROWS], -1e30, tl.float32)
    all_seen = inside[:, None]

    far = tile_lists + tl.load(tile_first + head * tiles + tile)
    count = tl.load(tile_count + head * tiles + tile)
    full = tl.load(tile_full + head * tiles + tile) // STEP * STEP
    for c in tl.range(0, full, STEP):
        j = tl.load(far + c + tl.arange(0, STEP))
        k_tile = load_all_rows(k, j, k_stride, HEAD_DIM, WIDTH)
        v_tile = load_all_rows(v, j, v_stride, HEAD_DIM, WIDTH)
        acc, total, peak = _attend(acc, total, peak, q_tile, k_tile, v_tile, all_seen, scale, False, PRECISION)
    first, inner, inner_end = near_tiles(i0, i1, window, begins, ends, KEYS, STEP)
    for j0 in tl.range(inner, inner_end, STEP):
        j = j0 + tl.arange(0, STEP)
        k_tile = load_all_rows(k, j, k_stride, HEAD_DIM, WIDTH)
        v_tile = load_all_rows(v, j, v_stride, HEAD_DIM, WIDTH)
        acc, total, peak = _attend(acc, total, peak, q_tile, k_tile, v_tile, all_seen, scale, False, PRECISION)
    edges = edge_tiles(count - full, first, inner, inner_end, i1, STEP)
    for edge in tl.range(0, edges):
        j, listed = edge_keys(edge, far, full, count, first, inner, inner_end, i1, STEP)
        seen_until = tl.load(until + j, mask=listed, other=0)
        k_tile = load_rows(k, j.to(tl.int64), listed, k_stride, 0, HEAD_DIM, WIDTH)
        v_tile = load_rows(v, j.to(tl.int64), listed, v_stride, 0, HEAD_DIM, WIDTH)
        visible = (j[None, :] <= token[:, None]) & (token[:, None] < seen_until[None, :])
        acc, total, peak = _attend(acc, total, peak, q_tile, k_tile, v_tile, visible, scale, True, PRECISION)

    total = tl.where(inside, total, 1.0)
    o_stride = tl.num_programs(0) // tiles * (PACK * HEAD_DIM)
    o_rows = token.to(tl.int64) * o_stride + query_head * HEAD_DIM
    tl.store(o + o_rows[:, None] + column[None, :], (acc / total[:, None]).to(o.dtype.element_ty), mask=q_mask)
    statistics = (head * tokens + token) * (GROUPS * PACK) + member
    tl.store(log_total + statistics, peak + tl.log2(total), mask=inside)
