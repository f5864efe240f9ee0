"""Backward kernels of attention under learnable token eviction.

`softmax_gradients` has the sums; beside them

    dr_j = <dv_j, v_j>    (He & Garner, arXiv 2510.20787, equation 6: the gradient of a gate on v where it is 1)
    dr_j = sum_i ds_ij    with LOGIT: that of a gate added to the logit
    dr_j += sum_i ds_ij   over the i that do not see j, where p_ij = e_ij / (Z_i + e_ij): `unseen_gradient_kernel`

and with the gate "displacing" less a part of their mean over what competes for the buffer: `displaced_gradient_kernel`.

p is computed again from the logits and the forward's log-denominators. dq goes by query tile, dk and dv by key tile,
and every output is written by one program in a fixed order: no atomics, the same bits every time. A key's far uses are
summed first, one row of fp32 partial sums for each chunk; its near uses are added to them where dk, dv and dr are
written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megahybrid_kernels.launch import kernel
from megahybrid_kernels.lte_attention.triton_columns import far_begin
from megahybrid_kernels.lte_attention.triton_forward import edge_keys, edge_tiles, near_tiles
from megahybrid_kernels.rows import load_all_rows, load_rows, packed_rows
from megahybrid_kernels.softmax_gradients import key_step, query_step, unseen_step


@kernel
def query_gradient_kernel(
    q, k, v, o, do, dq, log_total, delta, until, begins, ends, tile_lists, tile_first, tile_full, tile_count,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, tokens, window, scale, softmax_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PACK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta (fp32, laid out as log_total) for the kernel after it; o, do, dq contiguous. Walks as the forward.

    `scale` is head_dim ** -0.5 * log2(e), `softmax_scale` without the last factor.
    """
    ROWS: tl.constexpr = QUERIES * PACK
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
    o_stride = tl.num_programs(0) // tiles * (PACK * HEAD_DIM)
    o_rows = token.to(tl.int64) * o_stride + query_head * HEAD_DIM
    o_places = o_rows[:, None] + column[None, :]
    do_tile = tl.load(do + o_places, mask=q_mask, other=0)
    o_tile = tl.load(o + o_places, mask=q_mask, other=0)
    row_delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    statistics = (head * tokens + token) * (GROUPS * PACK) + member
    tl.store(delta + statistics, row_delta, mask=inside)
    # Rows that do not exist get p = 0.
    row_total = tl.load(log_total + statistics, mask=inside, other=float("inf"))
    k += head * k_head_stride
    v += head * v_head_stride
    until += head * tokens
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    all_seen = inside[:, None]

    far = tile_lists + tl.load(tile_first + head * tiles + tile)
    count = tl.load(tile_count + head * tiles + tile)
    full = tl.load(tile_full + head * tiles + tile) // STEP * STEP
    for c in tl.range(0, full, STEP):
        j = tl.load(far + c + tl.arange(0, STEP))
        k_tile = load_all_rows(k, j, k_stride, HEAD_DIM, WIDTH)
        v_tile = load_all_rows(v, j, v_stride, HEAD_DIM, WIDTH)
        acc = query_step(
            acc, q_tile, do_tile, k_tile, v_tile, row_total, row_delta, all_seen, scale, False, PRECISION
        )  # fmt: skip
    first, inner, inner_end = near_tiles(i0, i1, window, begins, ends, KEYS, STEP)
    for j0 in tl.range(inner, inner_end, STEP):
        j = j0 + tl.arange(0, STEP)
        k_tile = load_all_rows(k, j, k_stride, HEAD_DIM, WIDTH)
        v_tile = load_all_rows(v, j, v_stride, HEAD_DIM, WIDTH)
        acc = query_step(
            acc, q_tile, do_tile, k_tile, v_tile, row_total, row_delta, all_seen, scale, False, PRECISION
        )  # fmt: skip
    edges = edge_tiles(count - full, first, inner, inner_end, i1, STEP)
    for edge in tl.range(0, edges):
        j, listed = edge_keys(edge, far, full, count, first, inner, inner_end, i1, STEP)
        seen_until = tl.load(until + j, mask=listed, other=0)
        k_tile = load_rows(k, j.to(tl.int64), listed, k_stride, 0, HEAD_DIM, WIDTH)
        v_tile = load_rows(v, j.to(tl.int64), listed, v_stride, 0, HEAD_DIM, WIDTH)
        visible = (j[None, :] <= token[:, None]) & (token[:, None] < seen_until[None, :])
        acc = query_step(
            acc, q_tile, do_tile, k_tile, v_tile, row_total, row_delta, visible, scale, True, PRECISION
        )  # fmt: skip

    tl.store(dq + o_places, (acc * softmax_scale).to(dq.dtype.element_ty), mask=q_mask)


@triton.jit
def _key_step(
    dk, dv, gate, k, v, i0, lower, upper, q, do, log_total, delta, q_stride, q_head_stride, o_stride, tokens, group,
    scale, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PACK: tl.constexpr,
    QUERIES: tl.constexpr, LOGIT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`key_step` for the rows [i0, i0 + QUERIES), and with LOGIT the sums of ds; key j is seen by
    `lower_j <= i < upper_j`."""
    token, q_tile, do_tile, row_total, row_delta = _query_rows(
        i0, q, do, log_total, delta, q_stride, q_head_stride, o_stride, tokens, group,
        HEAD_DIM, WIDTH, GROUPS, PACK, QUERIES, MASKED,
    )  # fmt: skip
    visible = (token[None, :] >= lower[:, None]) & (token[None, :] < upper[:, None])
    dk, dv, ds = key_step(dk, dv, k, v, q_tile, do_tile, row_total, row_delta, visible, scale, MASKED, PRECISION)
    if LOGIT:
        gate += tl.sum(ds, 1)
    return dk, dv, gate


@triton.jit
def _query_rows(
    i0, q, do, log_total, delta, q_stride, q_head_stride, o_stride, tokens, group,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PACK: tl.constexpr, QUERIES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Tokens of the rows [i0, i0 + QUERIES), and their q, do, log_total and delta; some may not exist where MASKED."""
    token, member, inside = packed_rows(i0, tokens, group, QUERIES * PACK, PACK)
    column = tl.arange(0, WIDTH)
    q_rows = token.to(tl.int64) * q_stride + member.to(tl.int64) * q_head_stride
    q_places = q_rows[:, None] + column[None, :]
    o_places = (token.to(tl.int64) * o_stride + member * HEAD_DIM)[:, None] + column[None, :]
    statistics = token.to(tl.int64) * (GROUPS * PACK) + member
    if MASKED:
        mask = inside[:, None] & (column < HEAD_DIM)[None, :]
        q_tile = tl.load(q + q_places, mask=mask, other=0)
        do_tile = tl.load(do + o_places, mask=mask, other=0)
        row_total = tl.load(log_total + statistics, mask=inside, other=float("inf"))
        row_delta = tl.load(delta + statistics, mask=inside, other=0)
    elif WIDTH != HEAD_DIM:
        q_tile = tl.load(q + q_places, mask=(column < HEAD_DIM)[None, :], other=0)
        do_tile = tl.load(do + o_places, mask=(column < HEAD_DIM)[None, :], other=0)
        row_total, row_delta = tl.load(log_total + statistics), tl.load(delta + statistics)
    else:
        q_tile, do_tile = tl.load(q + q_places), tl.load(do + o_places)
        row_total, row_delta = tl.load(log_total + statistics), tl.load(delta + statistics)
    return token, q_tile, do_tile, row_total, row_delta


@triton.jit
def _sum_over_queries(
    k, v, lower, upper, i0, inner, inner_end, i1, q, do, log_total, delta, q_stride, q_head_stride, o_stride, tokens,
    scale, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PACK: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, LOGIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and, with LOGIT, the sums of ds over the rows [i0, i1), of which all keys are seen by [inner, inner_end),
    in tiles of QUERIES."""
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    gate = tl.zeros([KEYS], tl.float32)
    for group in tl.range(0, GROUPS):
        for i in tl.range(inner, inner_end, QUERIES):
            dk, dv, gate = _key_step(
                dk, dv, gate, k, v, i, lower, upper, q, do, log_total, delta, q_stride, q_head_stride, o_stride, tokens,
                group, scale, HEAD_DIM, WIDTH, GROUPS, PACK, QUERIES, LOGIT, False, PRECISION,
            )  # fmt: skip
        for step in tl.range(i0, i1 - (inner_end - inner), QUERIES):
            i = tl.where(step < inner, step, step + inner_end - inner)
            dk, dv, gate = _key_step(
                dk, dv, gate, k, v, i, lower, upper, q, do, log_total, delta, q_stride, q_head_stride, o_stride, tokens,
                group, scale, HEAD_DIM, WIDTH, GROUPS, PACK, QUERIES, LOGIT, True, PRECISION,
            )  # fmt: skip
    return dk, dv, gate


@kernel
def far_gradient_kernel(
    q, k, v, do, dk_partial, dv_partial, gate_partial, log_total, delta, until, partial, lists, list_counts,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, tokens, window, scale,
    chunk, chunks, capacity, count_stride, partial_rows,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PACK: tl.constexpr,
    PART_QUERIES: tl.constexpr, PART_KEYS: tl.constexpr, QUERIES: tl.constexpr, COLUMNS: tl.constexpr,
    LOGIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk / softmax_scale and dv that COLUMNS far columns get from one chunk's rows, as rows of partial sums.

    dk_partial, dv_partial: fp32 `[kv_heads, partial_rows, HEAD_DIM]`, gate_partial without HEAD_DIM; column j's row of
    its n-th chunk is `partial[j] + n`.
    """
    blocks = tl.cdiv(capacity, COLUMNS)
    block, number = tl.program_id(0) % blocks, tl.program_id(0) // blocks % chunks
    head, heads = (tl.program_id(0) // blocks // chunks).to(tl.int64), tl.num_programs(0) // blocks // chunks
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    count = tl.load(list_counts + head * count_stride + number)
    if block * COLUMNS < count:
        listed = c < count
        j = tl.load(lists + (head * chunks + number) * capacity + c, mask=listed, other=0)
        k_tile = load_rows(k + head * k_head_stride, j.to(tl.int64), listed, k_stride, 0, HEAD_DIM, WIDTH)
        v_tile = load_rows(v + head * v_head_stride, j.to(tl.int64), listed, v_stride, 0, HEAD_DIM, WIDTH)
        begin = far_begin(j, window, PART_QUERIES, PART_KEYS)
        lower = tl.maximum(begin, number * chunk)
        upper = tl.minimum(tl.load(until + head * tokens + j, mask=listed, other=0), (number + 1) * chunk)
        # All bounds are taken over the listed columns alone.
        i0 = tl.min(tl.where(listed, lower, tokens), 0) // QUERIES * QUERIES
        i1 = tl.max(tl.where(listed, upper, 0), 0)
        inner = (tl.max(tl.where(listed, lower, 0), 0) + QUERIES - 1) // QUERIES * QUERIES
        inner_end = tl.min(tl.where(listed, upper, tokens), 0) // QUERIES * QUERIES
        some = inner_end > inner
        inner, inner_end = tl.where(some, inner, i0), tl.where(some, inner_end, i0)
        o_stride = heads * (GROUPS * PACK * HEAD_DIM)
        dk, dv, gate = _sum_over_queries(
            k_tile, v_tile, lower, upper, i0, inner, inner_end, i1,
            q + head * (GROUPS * PACK) * q_head_stride, do + head * (GROUPS * PACK * HEAD_DIM),
            log_total + head * tokens * (GROUPS * PACK), delta + head * tokens * (GROUPS * PACK),
            q_stride, q_head_stride, o_stride, tokens, scale,
            HEAD_DIM, WIDTH, GROUPS, PACK, COLUMNS, QUERIES, LOGIT, PRECISION,
        )  # fmt: skip
        row = tl.load(partial + head * (tokens + 1) + j, mask=listed, other=0) + number - begin // chunk
        column = tl.arange(0, WIDTH)
        places = (head * partial_rows + row)[:, None] * HEAD_DIM + column[None, :]
        mask = listed[:, None] & (column < HEAD_DIM)[None, :]
        tl.store(dk_partial + places, dk, mask=mask)
        tl.store(dv_partial + places, dv, mask=mask)
        if LOGIT:
            tl.store(gate_partial + head * partial_rows + row, gate, mask=listed)


@kernel
def sum_chunks_kernel(
    dk_partial, dv_partial, gate_partial, columns, counts, partial, tokens, partial_rows,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, LOGIT: tl.constexpr,
):  # fmt: skip
    """Adds up each far column's rows of partial sums into its first."""
    blocks = tl.cdiv(tokens, COLUMNS)
    block, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    count = tl.load(counts + head * (tokens + 1) + tokens)
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    if block * COLUMNS < count:
        j = tl.load(columns + head * tokens + c, mask=c < count, other=0)
        first = tl.load(partial + head * (tokens + 1) + j, mask=c < count, other=0)
        rows = tl.load(partial + head * (tokens + 1) + j + 1, mask=c < count, other=0) - first
        column = tl.arange(0, WIDTH)
        start = (head * partial_rows + first)[:, None] * HEAD_DIM + column[None, :]
        some = (rows > 1)[:, None] & (column < HEAD_DIM)[None, :]
        dk, dv = tl.load(dk_partial + start, mask=some, other=0), tl.load(dv_partial + start, mask=some, other=0)
        places = start
        for n in range(1, tl.max(rows, 0)):
            places += HEAD_DIM
            more = (n < rows)[:, None] & (column < HEAD_DIM)[None, :]
            dk += tl.load(dk_partial + places, mask=more, other=0)
            dv += tl.load(dv_partial + places, mask=more, other=0)
        tl.store(dk_partial + start, dk, mask=some)
        tl.store(dv_partial + start, dv, mask=some)
        if LOGIT:
            gate_places = gate_partial + head * partial_rows + first
            gate = tl.load(gate_places, mask=rows > 1, other=0)
            for n in range(1, tl.max(rows, 0)):
                gate += tl.load(gate_places + n, mask=n < rows, other=0)
            tl.store(gate_places, gate, mask=rows > 1)


@kernel
def key_gradient_kernel(
    q, k, v, do, dk, dv, dscore, dk_partial, dv_partial, gate_partial, log_total, delta, until, rank, partial,
    begins, ends, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, tokens, window, scale,
    softmax_scale, partial_rows,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PACK: tl.constexpr,
    PART_QUERIES: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, LOGIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv (contiguous, k's dtype) and dscore (fp32 `[tokens, kv_heads]`) of KEYS keys: near uses plus partial sums.

    `near` and `far` uses of a key are told apart by query tiles of PART_QUERIES rows; see `triton_columns`.
    """
    blocks = tl.cdiv(tokens, KEYS)
    head, heads = (tl.program_id(0) // blocks).to(tl.int64), tl.num_programs(0) // blocks
    j0 = tl.program_id(0) % blocks * KEYS
    j = j0 + tl.arange(0, KEYS)
    exists = j < tokens
    k_tile = load_rows(k + head * k_head_stride, j.to(tl.int64), exists, k_stride, 0, HEAD_DIM, WIDTH)
    v_tile = load_rows(v + head * v_head_stride, j.to(tl.int64), exists, v_stride, 0, HEAD_DIM, WIDTH)
    upper = tl.load(until + head * tokens + j, mask=exists, other=0)
    end = tl.load(ends + j0)
    last = tl.load(ends + tl.minimum(j0 + KEYS, tokens) - 1)
    i0 = j0 // QUERIES * QUERIES
    i1 = tl.minimum(far_begin(j0, window, PART_QUERIES, KEYS), last)
    inner = (j0 + KEYS - 1 + QUERIES - 1) // QUERIES * QUERIES
    inner_end = tl.minimum(j0 + window + 1, end) // QUERIES * QUERIES
    # With a border of documents among the keys every row needs the mask.
    some = (inner_end > inner) & (end >= j0 + KEYS)
    inner, inner_end = tl.where(some, inner, i0), tl.where(some, inner_end, i0)
    dk_acc, dv_acc, gate = _sum_over_queries(
        k_tile, v_tile, j, upper, i0, inner, inner_end, i1,
        q + head * (GROUPS * PACK) * q_head_stride, do + head * (GROUPS * PACK * HEAD_DIM),
        log_total + head * tokens * (GROUPS * PACK), delta + head * tokens * (GROUPS * PACK),
        q_stride, q_head_stride, heads * (GROUPS * PACK * HEAD_DIM), tokens, scale,
        HEAD_DIM, WIDTH, GROUPS, PACK, KEYS, QUERIES, LOGIT, PRECISION,
    )  # fmt: skip
    ranks = rank + head * (tokens + 1) + j
    is_far = tl.load(ranks + 1, mask=exists, other=0) > tl.load(ranks, mask=exists, other=0)
    row = tl.load(partial + head * (tokens + 1) + j, mask=exists, other=0)
    column = tl.arange(0, WIDTH)
    far_places = (head * partial_rows + row)[:, None] * HEAD_DIM + column[None, :]
    far_mask = is_far[:, None] & (column < HEAD_DIM)[None, :]
    dk_acc += tl.load(dk_partial + far_places, mask=far_mask, other=0)
    dv_acc += tl.load(dv_partial + far_places, mask=far_mask, other=0)

    places = (j.to(tl.int64) * heads + head)[:, None] * HEAD_DIM + column[None, :]
    mask = exists[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(dk + places, (dk_acc * softmax_scale).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + places, dv_acc.to(dv.dtype.element_ty), mask=mask)
    if LOGIT:
        gate += tl.load(gate_partial + head * partial_rows + row, mask=is_far, other=0)
    else:
        gate = tl.sum(dv_acc * v_tile.to(tl.float32), 1)
    tl.store(dscore + j.to(tl.int64) * heads + head, gate, mask=exists)


@kernel
def unseen_gradient_kernel(
    q, k, v, do, dscore, log_total, delta, until, ends, q_stride, q_head_stride, k_stride, k_head_stride, v_stride,
    v_head_stride, tokens, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PACK: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dscore (fp32 `[tokens, kv_heads]`) of KEYS keys what the later rows of their document give that do not
    see them: `until_j <= i < ends_j`; do is contiguous."""
    blocks = tl.cdiv(tokens, KEYS)
    head, heads = (tl.program_id(0) // blocks).to(tl.int64), tl.num_programs(0) // blocks
    j = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
    exists = j < tokens
    lower = tl.load(until + head * tokens + j, mask=exists, other=0)
    upper = tl.load(ends + j, mask=exists, other=0)
    some = lower < upper
    i0 = tl.min(tl.where(some, lower, tokens), 0) // QUERIES * QUERIES
    i1 = tl.max(tl.where(some, upper, 0), 0)
    k_tile = load_rows(k + head * k_head_stride, j.to(tl.int64), exists, k_stride, 0, HEAD_DIM, WIDTH)
    v_tile = load_rows(v + head * v_head_stride, j.to(tl.int64), exists, v_stride, 0, HEAD_DIM, WIDTH)
    first = head * (GROUPS * PACK)
    gate = tl.zeros([KEYS, QUERIES * PACK], tl.float32)
    for group in tl.range(0, GROUPS):
        for i in tl.range(i0, i1, QUERIES):
            token, q_tile, do_tile, row_total, row_delta = _query_rows(
                i, q + first * q_head_stride, do + first * HEAD_DIM, log_total + first * tokens, delta + first * tokens,
                q_stride, q_head_stride, heads * (GROUPS * PACK * HEAD_DIM), tokens, group,
                HEAD_DIM, WIDTH, GROUPS, PACK, QUERIES, True,
            )  # fmt: skip
            unseen = (token[None, :] >= lower[:, None]) & (token[None, :] < upper[:, None])
            gate = unseen_step(gate, k_tile, v_tile, q_tile, do_tile, row_total, row_delta, unseen, scale, PRECISION)
    place = dscore + j.to(tl.int64) * heads + head
    tl.store(place, tl.load(place, mask=exists, other=0) + tl.sum(gate, 1), mask=exists)


@kernel
def displaced_gradient_kernel(dscore, score, cu_seqlens, window, sinks, room, heads, BLOCK: tl.constexpr):
    """Takes `1 - room / n` of their mean from dscore (fp32 `[tokens, heads]`) of the n tokens of a document and head
    that compete for fewer places, `room`: those that leave the window, have a positive score and are no sinks."""
    document, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    begin = tl.load(cu_seqlens + document) + sinks
    end = tl.load(cu_seqlens + document + 1) - 1 - window
    total = tl.zeros([BLOCK], tl.float32)
    rivals = tl.zeros([BLOCK], tl.int32)
    for j0 in tl.range(begin, end, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        place = j.to(tl.int64) * heads + head
        competes = tl.load(score + place, mask=j < end, other=0) > 0
        total += tl.load(dscore + place, mask=competes, other=0)
        rivals += competes.to(tl.int32)
    count = tl.sum(rivals)
    if count > room:
        common = tl.sum(total) / count * (1 - room / count)
        for j0 in tl.range(begin, end, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            place = j.to(tl.int64) * heads + head
            competes = tl.load(score + place, mask=j < end, other=0) > 0
            gradient = tl.load(dscore + place, mask=competes, other=0)
            tl.store(dscore + place, gradient - common, mask=competes)
