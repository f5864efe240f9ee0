"""Gradients of keys and values: by block of keys, over the query rows that see them.

    dk, dv of a token = its window and its own two last blocks (`key_gradient_kernel`, which writes them)
                      + the far pairs of its block (`selected_gradient_kernel`, see `triton_pairs`)
                      + the gradient of its block's mean / block_size (`compressed_gradient_kernel`)

The last two sum items of bounded work into fp32 rows that the first adds up in a fixed order. As
`softmax_gradients.key_step`, with a branch's gate in its log-denominators (`triton_query_gradient.prepare_kernel`).
`statistics` are fp32 `[tokens, query_heads, 2]` of a branch: these, and deltas. q and do are contiguous. Partial sums
of dk leave out the softmax's scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megahybrid_kernels.launch import kernel
from megahybrid_kernels.native_sparse_attention.triton_query_gradient import load_statistics
from megahybrid_kernels.rows import load_all_rows, load_rows, store_rows
from megahybrid_kernels.softmax_gradients import key_step


@triton.jit
def _query_places(head, heads, QUERIES: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr):
    """Of each row of a step: its number among the step's tokens, its place in `[tokens, query_heads]` from its token's
    first on, and whether there is such a head.

    Neighbouring rows are of different tokens: so all rows of a tile that one thread loads are of the same, which spares
    it registers.
    """
    row = tl.arange(0, QUERIES * HEADS)
    member = row // QUERIES
    return row % QUERIES, head * GROUPS + member, member < GROUPS


@triton.jit
def _load_queries(q, do, first, places, inside, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    q += first * HEAD_DIM
    do += first * HEAD_DIM
    if MASKED:
        return (
            load_rows(q, places, inside, HEAD_DIM, 0, HEAD_DIM, WIDTH),
            load_rows(do, places, inside, HEAD_DIM, 0, HEAD_DIM, WIDTH),
        )
    return (
        load_all_rows(q, places, HEAD_DIM, HEAD_DIM, WIDTH),
        load_all_rows(do, places, HEAD_DIM, HEAD_DIM, WIDTH),
    )


@triton.jit
def _rows_step(
    dk, dv, k, v, first, places, inside, visible, q, do, statistics, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, SEEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`key_step` of one branch for the rows `first + places`: MASKED where some may be outside, SEEN where all that are
    inside see every key."""
    q_tile, do_tile = _load_queries(q, do, first, places, inside, HEAD_DIM, WIDTH, MASKED)
    row_total, row_delta = load_statistics(statistics + first * 2, places, inside, MASKED)
    return key_step(dk, dv, k, v, q_tile, do_tile, row_total, row_delta, visible, scale, not SEEN, PRECISION)


@triton.jit
def _band_step(
    dk, dv, k, v, distance, window, first, places, inside, q, do, selected_statistics, window_statistics, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The selected and the window branch at once; `distance` from keys to rows, which select the keys' block."""
    q_tile, do_tile = _load_queries(q, do, first, places, inside, HEAD_DIM, WIDTH, True)
    logits = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION) * scale
    selected_total, selected_delta = load_statistics(selected_statistics + first * 2, places, inside, True)
    window_total, window_delta = load_statistics(window_statistics + first * 2, places, inside, True)
    p_selected = tl.where(distance >= 0, tl.exp2(logits - selected_total[None, :]), 0.0)
    in_window = (distance >= 0) & (distance < window)
    p_window = tl.where(in_window, tl.exp2(logits - window_total[None, :]), 0.0)
    dv = tl.dot((p_selected + p_window).to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do_tile), input_precision=PRECISION)
    ds = p_selected * (dp - selected_delta[None, :]) + p_window * (dp - window_delta[None, :])
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _store_partial(partial, rows, x, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    tl.store(partial + rows[:, None] * HEAD_DIM + column[None, :], x, mask=(column < HEAD_DIM)[None, :])


@kernel
def selected_gradient_kernel(
    q, k, v, do, dk_partial, dv_partial, statistics, pairs, pair_first, item_first, item_block, block_firsts,
    k_stride, k_head_stride, v_stride, v_head_stride, blocks, items, pair_count, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    ITEM: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What KEYS keys of a block get from at most ITEM of the tokens that select it from afar: one item of `Pairs`.

    dk_partial, dv_partial: fp32 `[kv_heads, items, BLOCK, HEAD_DIM]`.
    """
    PARTS: tl.constexpr = BLOCK // KEYS
    program = tl.program_id(0) // PARTS
    item, head = program % items, (program // items).to(tl.int64)
    heads = tl.num_programs(0) // PARTS // items
    query_heads = heads.to(tl.int64) * GROUPS
    block = tl.load(item_block + head * items + item)
    if block < blocks:
        cut = item - tl.load(item_first + head * (blocks + 1) + block)
        begin = tl.load(pair_first + head * (blocks + 1) + block) + cut.to(tl.int64) * ITEM
        end = tl.load(pair_first + head * (blocks + 1) + block + 1)
        count = tl.minimum(tl.maximum(end - begin, 0), ITEM).to(tl.int32)
        pairs += head * pair_count + begin
        part = tl.program_id(0) % PARTS * KEYS + tl.arange(0, KEYS)
        j = tl.load(block_firsts + block) + part
        k_tile = load_all_rows(k + head * k_head_stride, j, k_stride, HEAD_DIM, WIDTH)
        v_tile = load_all_rows(v + head * v_head_stride, j, v_stride, HEAD_DIM, WIDTH)
        number, place, exists = _query_places(head, heads, QUERIES, GROUPS, HEADS)
        dk = tl.zeros([KEYS, WIDTH], tl.float32)
        dv = tl.zeros([KEYS, WIDTH], tl.float32)
        full = count // QUERIES * QUERIES
        # Loaded a step ahead of the rows whose addresses it gives.
        token = tl.load(pairs + number, mask=number < count, other=0)
        for n in tl.range(0, full, QUERIES):
            places = token * query_heads + place
            following = n + QUERIES + number
            token = tl.load(pairs + following, mask=following < count, other=0)
            dk, dv = _rows_step(
                dk, dv, k_tile, v_tile, 0, places, exists, exists, q, do, statistics, scale,
                HEAD_DIM, WIDTH, GROUPS != HEADS, True, PRECISION,
            )  # fmt: skip
        for n in tl.range(full, count, QUERIES):
            inside = exists & (n + number < count)
            places = token * query_heads + place
            dk, dv = _rows_step(
                dk, dv, k_tile, v_tile, 0, places, inside, inside, q, do, statistics, scale,
                HEAD_DIM, WIDTH, True, True, PRECISION,
            )  # fmt: skip
        rows = (head * items + item) * BLOCK + part
        _store_partial(dk_partial, rows, dk, HEAD_DIM, WIDTH)
        _store_partial(dv_partial, rows, dv, HEAD_DIM, WIDTH)


@triton.jit
def part_tokens(length, PART: tl.constexpr, MOST_PARTS: tl.constexpr):
    """Tokens of a part of a document in `compressed_gradient_kernel`; see `triton_pairs.PooledItems`."""
    return tl.cdiv(length, PART * MOST_PARTS) * PART


@kernel
def compressed_gradient_kernel(
    q, pooled_k, pooled_v, do, dk_partial, dv_partial, statistics, begins, ends, blocks_before, tile_firsts,
    item_tile, item_begin, item_row, items, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    POOLED: tl.constexpr, PART: tl.constexpr, MOST_PARTS: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What KEYS of POOLED neighbouring means get from a part of their document's tokens: one item of `PooledItems`.

    pooled_k, pooled_v: `[blocks, kv_heads, HEAD_DIM]`; dk_partial, dv_partial: fp32 `[rows, kv_heads, HEAD_DIM]`.
    Items before the first token that sees their means are left as they are.
    """
    PARTS: tl.constexpr = POOLED // KEYS
    program = tl.program_id(0) // PARTS
    item, head = program % items, (program // items).to(tl.int64)
    heads = tl.num_programs(0) // PARTS // items
    query_heads = heads.to(tl.int64) * GROUPS
    tile = tl.load(item_tile + item)
    row0 = tl.load(tile_firsts + tile)
    begin, end = tl.load(begins + row0), tl.load(ends + row0)
    first = (row0 - begin) // BLOCK + tl.program_id(0) % PARTS * KEYS
    complete = (end - begin) // BLOCK
    size = part_tokens(end - begin, PART, MOST_PARTS)
    part_begin = tl.load(item_begin + item)
    i0 = tl.maximum(part_begin, begin + (first + 1) * BLOCK - 1)
    i1 = tl.minimum(part_begin + size, end)
    if (first < complete) & (i0 < i1):
        n = first + tl.arange(0, KEYS)
        places = (tl.load(blocks_before + row0) + n).to(tl.int64)
        pooled_stride = heads * HEAD_DIM
        k_tile = load_rows(pooled_k + head * HEAD_DIM, places, n < complete, pooled_stride, 0, HEAD_DIM, WIDTH)
        v_tile = load_rows(pooled_v + head * HEAD_DIM, places, n < complete, pooled_stride, 0, HEAD_DIM, WIDTH)
        lower = begin + (n + 1) * BLOCK - 1
        # From here on all rows see all of these means.
        seen = begin + tl.minimum(first + KEYS, complete) * BLOCK - 1
        inner = tl.minimum(i0 + tl.cdiv(tl.maximum(seen - i0, 0), QUERIES) * QUERIES, i1)
        inner_end = inner + (i1 - inner) // QUERIES * QUERIES
        number, place, exists = _query_places(head, heads, QUERIES, GROUPS, HEADS)
        places = number * query_heads + place
        dk = tl.zeros([KEYS, WIDTH], tl.float32)
        dv = tl.zeros([KEYS, WIDTH], tl.float32)
        for i in tl.range(inner, inner_end, QUERIES):
            dk, dv = _rows_step(
                dk, dv, k_tile, v_tile, i * query_heads, places, exists, exists, q, do, statistics, scale,
                HEAD_DIM, WIDTH, GROUPS != HEADS, True, PRECISION,
            )  # fmt: skip
        for step in tl.range(i0, i1 - (inner_end - inner), QUERIES):
            i = tl.where(step < inner, step, step + inner_end - inner)
            token = i + number
            dk, dv = _rows_step(
                dk, dv, k_tile, v_tile, i * query_heads, places, exists & (token < i1),
                token[None, :] >= lower[:, None], q, do, statistics, scale, HEAD_DIM, WIDTH, True, False, PRECISION,
            )  # fmt: skip
        # By what is loaded here, so that the loops hold none of it.
        first_row = tl.load(item_row + item)
        slot = tl.program_id(0) % PARTS * KEYS + tl.arange(0, KEYS)
        exist = slot < tl.load(item_row + item + 1) - first_row
        rows = (first_row + slot) * heads + head
        store_rows(dk_partial, dk, rows, exist, HEAD_DIM, 0, HEAD_DIM, WIDTH)
        store_rows(dv_partial, dv, rows, exist, HEAD_DIM, 0, HEAD_DIM, WIDTH)


@triton.jit
def _pooled_gradient(
    partial, first_row, row_stride, first_part, parts,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MOST_PARTS: tl.constexpr,
):  # fmt: skip
    """`[WIDTH]`: one mean's rows of partial sums, of each part one, added up."""
    part, column = tl.arange(0, MOST_PARTS), tl.arange(0, WIDTH)
    rows = first_row + part * row_stride
    mask = ((part >= first_part) & (part < parts))[:, None] & (column < HEAD_DIM)[None, :]
    return tl.sum(tl.load(partial + rows[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0), 0)


@kernel
def key_gradient_kernel(
    q, k, v, do, dk, dv, selected_dk, selected_dv, pooled_dk, pooled_dv, selected_statistics, window_statistics,
    begins, ends, block_firsts, pair_item_first, pooled_tiles_before, pooled_row_first,
    k_stride, k_head_stride, v_stride, v_head_stride, blocks, pair_items, window, scale, softmax_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    POOLED: tl.constexpr, PART: tl.constexpr, MOST_PARTS: tl.constexpr, KEYS: tl.constexpr, POOLED_KEYS: tl.constexpr,
    QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv (contiguous, k's dtype) of KEYS keys of a block: band and window, and what the other kernels summed.

    The band are the tokens of the keys' block and of the next: to them it is the block of their own or the one before,
    which every selection holds.
    """
    PARTS: tl.constexpr = BLOCK // KEYS
    program = tl.program_id(0) // PARTS
    block, head = program % blocks, (program // blocks).to(tl.int64)
    heads = tl.num_programs(0) // PARTS // blocks
    query_heads = heads.to(tl.int64) * GROUPS
    row0 = tl.load(block_firsts + block)
    begin, end = tl.load(begins + row0), tl.load(ends + row0)
    part = tl.program_id(0) % PARTS * KEYS
    j0 = row0 + part
    j = j0 + tl.arange(0, KEYS)
    exists = j < end
    if j0 < end:
        k_tile = load_rows(k + head * k_head_stride, j.to(tl.int64), exists, k_stride, 0, HEAD_DIM, WIDTH)
        v_tile = load_rows(v + head * v_head_stride, j.to(tl.int64), exists, v_stride, 0, HEAD_DIM, WIDTH)
        number, place, some = _query_places(head, heads, QUERIES, GROUPS, HEADS)
        places = number * query_heads + place
        dk_acc = tl.zeros([KEYS, WIDTH], tl.float32)
        dv_acc = tl.zeros([KEYS, WIDTH], tl.float32)
        band_end = tl.minimum(row0 + 2 * BLOCK, end)
        for i in tl.range(j0, band_end, QUERIES):
            token = i + number
            dk_acc, dv_acc = _band_step(
                dk_acc, dv_acc, k_tile, v_tile, token[None, :] - j[:, None], window,
                i * query_heads, places, some & (token < band_end), q, do, selected_statistics,
                window_statistics, scale, HEAD_DIM, WIDTH, PRECISION,
            )  # fmt: skip
        i1 = tl.minimum(j0 + KEYS - 1 + window, end)
        inner_end = band_end + tl.maximum(tl.minimum(j0 + window, end) - band_end, 0) // QUERIES * QUERIES
        for i in tl.range(band_end, inner_end, QUERIES):
            dk_acc, dv_acc = _rows_step(
                dk_acc, dv_acc, k_tile, v_tile, i * query_heads, places, some, some, q, do, window_statistics, scale,
                HEAD_DIM, WIDTH, GROUPS != HEADS, True, PRECISION,
            )  # fmt: skip
        for i in tl.range(inner_end, i1, QUERIES):
            token = i + number
            dk_acc, dv_acc = _rows_step(
                dk_acc, dv_acc, k_tile, v_tile, i * query_heads, places, some & (token < i1),
                token[None, :] - j[:, None] < window, q, do, window_statistics, scale,
                HEAD_DIM, WIDTH, True, False, PRECISION,
            )  # fmt: skip

        column = tl.arange(0, WIDTH)
        mask = exists[:, None] & (column < HEAD_DIM)[None, :]
        first_item = pair_item_first + head * (blocks + 1) + block
        for item in tl.range(tl.load(first_item), tl.load(first_item + 1)):
            rows = (head * pair_items + item) * BLOCK + part + tl.arange(0, KEYS)
            sums = rows[:, None] * HEAD_DIM + column[None, :]
            dk_acc += tl.load(selected_dk + sums, mask=mask, other=0)
            dv_acc += tl.load(selected_dv + sums, mask=mask, other=0)
        n, complete = (row0 - begin) // BLOCK, (end - begin) // BLOCK
        if n < complete:
            size = part_tokens(end - begin, PART, MOST_PARTS)
            first_row = tl.load(pooled_row_first + tl.load(pooled_tiles_before + row0) + n // POOLED) + n % POOLED
            means = tl.minimum(complete - n // POOLED * POOLED, POOLED)
            # The parts from the first token on that sees one of the means that were summed together.
            first_part, parts = ((n // POOLED_KEYS * POOLED_KEYS + 1) * BLOCK - 1) // size, tl.cdiv(end - begin, size)
            first_row, row_stride = first_row * heads + head, means * heads
            dk_pooled = _pooled_gradient(
                pooled_dk, first_row, row_stride, first_part, parts, HEAD_DIM, WIDTH, MOST_PARTS
            )  # fmt: skip
            dv_pooled = _pooled_gradient(
                pooled_dv, first_row, row_stride, first_part, parts, HEAD_DIM, WIDTH, MOST_PARTS
            )  # fmt: skip
            dk_acc += dk_pooled[None, :] / BLOCK
            dv_acc += dv_pooled[None, :] / BLOCK
        out = (j.to(tl.int64) * heads + head)[:, None] * HEAD_DIM + column[None, :]
        tl.store(dk + out, (dk_acc * softmax_scale).to(dk.dtype.element_ty), mask=mask)
        tl.store(dv + out, dv_acc.to(dv.dtype.element_ty), mask=mask)
