"""Gradients of the gated delta rule's inputs, all chunks at once, from the states and what the scans leave.

With S before and dS' after a chunk, u and dv of `triton_scan`, D, L and A of `triton_prepare`, q and k normalised and
s = Dk^-0.5:

    dq = s exp(G) do S^T + (s D do u^T) k
    dk = exp(G_end - G) u dS'^T - exp(G) dv S^T + (s D do u^T)^T q + (N + N^T) k
    N  = -D dv u^T below the diagonal
    db = (1 - sigmoid(b)) <dv, u> / beta

(the last since dv = beta y, dL = -y u^T and d beta_i = <y_i, x_i - sum_j L_ij u_j / beta_i> = <y_i, u_i> / beta_i). The
log-decay g_t acts wherever something passes token t. Summing just these terms, instead of gradients of G that have to
cancel, keeps the gradients of strong decays exact:

    dg_t = sum_{i >= t > j} (A_ij <do_i, u_j> + N_ij <k_i, k_j>)                      between tokens of the chunk
         + sum_{i >= t} <q_i, s exp(G) do S^T> - <k_i, exp(G) dv S^T>                 from the state before
         + sum_{j < t} <k_j, exp(G_end - G) u dS'^T> + exp(G_end) <S, dS'>            to the state after

A chunk's dq and dk are two programs that need nothing of each other: side by side on a multiprocessor, either works
while the other waits for memory. What they find about the gates is put together by a third, in another launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megahybrid_kernels.gated_delta_rule.triton_prepare import (
    G_HIGH,
    G_LOW,
    NORM_K,
    NORM_Q,
    ROW_KINDS,
    decay_between,
    gate_inputs,
    load_square,
    log_decay,
)
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.rows import load_rows, store_rows

# Rows of what `gradient_kernel` leaves for each chunk and value head, by token.
PART_Q = tl.constexpr(0)  # what A and S add to dg
PART_K = tl.constexpr(1)  # what N adds to dg
PART_READ_Q = tl.constexpr(2)  # <q, s exp(G) do S^T>
PART_READ_K = tl.constexpr(3)  # -<k, exp(G) dv S^T>
PART_WRITTEN = tl.constexpr(4)  # <k, exp(G_end - G) u dS'^T>
PART_B = tl.constexpr(5)  # <dv, u>
PART_KINDS = tl.constexpr(6)


@triton.jit
def _gates(rows, CHUNK: tl.constexpr):
    """Both parts of G, and 1 / |q|, 1 / |k|."""
    i = tl.arange(0, CHUNK)
    high, low = tl.load(rows + G_HIGH * CHUNK + i), tl.load(rows + G_LOW * CHUNK + i)
    return high, low, tl.load(rows + NORM_Q * CHUNK + i), tl.load(rows + NORM_K * CHUNK + i)


@triton.jit
def _decay(high, low):
    """exp(-|G_i - G_j|): D where i >= j, and D^T where i <= j."""
    return tl.exp(-tl.abs((high[:, None] - high[None, :]) + (low[:, None] - low[None, :])))


@triton.jit
def _across(pairs, CHUNK: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """`[CHUNK]`, at t the sum of pairs_ij over j < t <= i."""
    i = tl.arange(0, CHUNK)
    after = tl.where(i[:, None] <= i[None, :], 1.0, 0.0)
    if dtype == tl.bfloat16:
        # In two parts: what is in registers is an operand of 16 bits as it lies there. A loop keeps the products apart.
        sums = tl.zeros([CHUNK, CHUNK], tl.float32)
        for _ in tl.range(0, 2, num_stages=1):
            high = (pairs.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
            sums = tl.dot(after.to(dtype), high.to(dtype), sums)
            pairs -= high
    else:
        sums = tl.dot(after, pairs, input_precision=PRECISION)
    return tl.sum(tl.where(i[:, None] > i[None, :], sums, 0.0), 1)


@triton.jit
def _query_gradient(
    query, key, do, u, states, dstates, rows, end, attention, parts, dq, row, inside, q_stride, k_stride, dq_stride,
    value_stride, scale, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and what passes tokens on the way to q or past the chunk."""
    i = tl.arange(0, CHUNK)
    passed = tl.zeros([COLUMNS], tl.float32)
    do_u = tl.zeros([CHUNK, CHUNK], tl.float32)
    dq_tile = tl.zeros([CHUNK, WIDTH], tl.float32)
    column = tl.arange(0, COLUMNS)
    for first in tl.range(0, VALUE_DIM, COLUMNS):
        do_tile = load_rows(do, row, inside, value_stride, first, VALUE_DIM, COLUMNS)
        u_tile = load_rows(u, row, inside, value_stride, first, VALUE_DIM, COLUMNS)
        state = load_rows(states, first + column, first + column < VALUE_DIM, KEY_DIM, 0, KEY_DIM, WIDTH)
        do_u = tl.dot(do_tile, tl.trans(u_tile), do_u, input_precision=PRECISION)
        dq_tile = tl.dot(do_tile, state, dq_tile, input_precision=PRECISION)
        dstate = load_rows(dstates, first + column, first + column < VALUE_DIM, KEY_DIM, 0, KEY_DIM, WIDTH)
        passed += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    pairs = load_square(attention, CHUNK).to(tl.float32) * do_u
    tl.store(
        parts + PART_Q * CHUNK + i, _across(pairs, CHUNK, key.dtype.element_ty, PRECISION) + end * tl.sum(passed, 0)
    )
    high, low, q_norm, k_norm = _gates(rows, CHUNK)
    k_tile = load_rows(key, row, inside, k_stride, 0, KEY_DIM, WIDTH)
    by_q = tl.where(i[:, None] >= i[None, :], do_u * _decay(high, low) * (scale * k_norm)[None, :], 0.0)
    by_q = by_q.to(k_tile.dtype)
    dq_tile *= (scale * tl.exp(high))[:, None]
    q_wide = load_rows(query, row, inside, q_stride, 0, KEY_DIM, WIDTH).to(tl.float32)
    tl.store(parts + PART_READ_Q * CHUNK + i, q_norm * tl.sum(q_wide * dq_tile, 1))
    dq_tile = tl.dot(by_q, k_tile, dq_tile, input_precision=PRECISION)
    # Again, rather than held meanwhile.
    q_wide = load_rows(query, row, inside, q_stride, 0, KEY_DIM, WIDTH).to(tl.float32)
    along = q_norm * q_norm * tl.sum(q_wide * dq_tile, 1)
    dq_tile = q_norm[:, None] * (dq_tile - along[:, None] * q_wide)
    store_rows(dq, dq_tile, row, inside, dq_stride, 0, KEY_DIM, WIDTH)


@triton.jit
def _key_gradient(
    query, key, do, u, dv, states, dstates, rows, parts, dk, row, inside, turns, q_stride, k_stride, dk_stride,
    value_stride, scale, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, and what passes tokens on the way to or from k."""
    i = tl.arange(0, CHUNK)
    dtype = key.dtype.element_ty
    high, low, q_norm, k_norm = _gates(rows, CHUNK)
    end_high, end_low = tl.load(rows + G_HIGH * CHUNK + CHUNK - 1), tl.load(rows + G_LOW * CHUNK + CHUNK - 1)
    until_end = decay_between(end_high, end_low, high, low, inside)
    column = tl.arange(0, COLUMNS)
    # Two loops for want of registers. What the state after adds meets k as <k dS'^T, u>, of what the state before adds
    # <k, dv S^T> is <k S, dv>: dk itself, the sum of both, is spread over the threads in another way.
    dk_tile = tl.zeros([CHUNK, WIDTH], tl.float32)
    k_tile = load_rows(key, row, inside, k_stride, 0, KEY_DIM, WIDTH)
    written = tl.zeros([CHUNK], tl.float32)
    for first in tl.range(0, VALUE_DIM, COLUMNS):
        u_tile = load_rows(u, row, inside, value_stride, first, VALUE_DIM, COLUMNS)
        dstate = load_rows(dstates, first + column, first + column < VALUE_DIM, KEY_DIM, 0, KEY_DIM, WIDTH)
        scaled = until_end[:, None] * u_tile.to(tl.float32)
        written += tl.sum(tl.dot(k_tile, tl.trans(dstate), input_precision=PRECISION) * scaled, 1)
        dk_tile = tl.dot(scaled.to(dtype), dstate, dk_tile, input_precision=PRECISION)
    tl.store(parts + PART_WRITTEN * CHUNK + i, k_norm * written)
    read = tl.zeros([CHUNK], tl.float32)
    since_start = -tl.exp(high)
    for first in tl.range(0, VALUE_DIM, COLUMNS):
        dv_tile = load_rows(dv, row, inside, value_stride, first, VALUE_DIM, COLUMNS)
        state = load_rows(states, first + column, first + column < VALUE_DIM, KEY_DIM, 0, KEY_DIM, WIDTH)
        scaled = since_start[:, None] * dv_tile.to(tl.float32)
        read += tl.sum(tl.dot(k_tile, tl.trans(state), input_precision=PRECISION) * scaled, 1)
        dk_tile = tl.dot(scaled.to(dtype), state, dk_tile, input_precision=PRECISION)
    tl.store(parts + PART_READ_K * CHUNK + i, k_norm * read)
    # Transposed products are computed anew: Triton below 3.7.1 miscompiles transposed results of tl.dot on Hopper.
    u_do = tl.zeros([CHUNK, CHUNK], tl.float32)
    u_dv = tl.zeros([CHUNK, CHUNK], tl.float32)
    dv_u = tl.zeros([CHUNK, CHUNK], tl.float32)
    for first in tl.range(0, VALUE_DIM, COLUMNS):
        u_tile = load_rows(u, row, inside, value_stride, first, VALUE_DIM, COLUMNS)
        do_tile = load_rows(do, row, inside, value_stride, first, VALUE_DIM, COLUMNS)
        dv_tile = load_rows(dv, row, inside, value_stride, first, VALUE_DIM, COLUMNS)
        u_do = tl.dot(u_tile, tl.trans(do_tile), u_do, input_precision=PRECISION)
        u_dv = tl.dot(u_tile, tl.trans(dv_tile), u_dv, input_precision=PRECISION)
        dv_u = tl.dot(dv_tile, tl.trans(u_tile), dv_u, input_precision=PRECISION)
    high, low, q_norm, k_norm = _gates(rows, CHUNK)
    decay = _decay(high, low)
    by_k = tl.where(i[:, None] <= i[None, :], u_do * decay * (scale * q_norm)[None, :], 0.0).to(dtype)
    # Loops of one turn: where one product is seen to enter another, the compiler gives eight warps the rows of sixteen.
    for _ in tl.range(0, turns, num_stages=1):
        q_tile = load_rows(query, row, inside, q_stride, 0, KEY_DIM, WIDTH)
        dk_tile = tl.dot(by_k, q_tile, dk_tile, input_precision=PRECISION)
    tl.store(parts + PART_B * CHUNK + i, tl.sum(tl.where(i[:, None] == i[None, :], dv_u, 0.0), 1))
    # N + N^T, but for the keys' norms and the sign.
    both = tl.where(i[:, None] > i[None, :], dv_u, tl.where(i[:, None] < i[None, :], u_dv, 0.0)) * decay
    by_kk = (both * -k_norm[None, :]).to(dtype)
    kk = tl.zeros([CHUNK, CHUNK], tl.float32)
    for first in tl.range(0, KEY_DIM, COLUMNS):
        k_part = load_rows(key, row, inside, k_stride, first, KEY_DIM, COLUMNS)
        kk = tl.dot(k_part, tl.trans(k_part), kk, input_precision=PRECISION)
    pairs = tl.where(i[:, None] > i[None, :], kk * both * -k_norm[:, None] * k_norm[None, :], 0.0)
    tl.store(parts + PART_K * CHUNK + i, _across(pairs, CHUNK, dtype, PRECISION))
    for _ in tl.range(0, turns, num_stages=1):
        k_tile = load_rows(key, row, inside, k_stride, 0, KEY_DIM, WIDTH)
        dk_tile = tl.dot(by_kk, k_tile, dk_tile, input_precision=PRECISION)
    high, low, q_norm, k_norm = _gates(rows, CHUNK)
    k_wide = load_rows(key, row, inside, k_stride, 0, KEY_DIM, WIDTH).to(tl.float32)
    along = k_norm * k_norm * tl.sum(k_wide * dk_tile, 1)
    dk_tile = k_norm[:, None] * (dk_tile - along[:, None] * k_wide)
    store_rows(dk, dk_tile, row, inside, dk_stride, 0, KEY_DIM, WIDTH)


@kernel
def gradient_kernel(
    q, k, rows, ends, attention, do, u, dv, states, dstates, parts, dq, dk, chunks,
    q_stride, q_head_stride, k_stride, k_head_stride, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """dk (even programs) or dq (odd ones) of one chunk of one value head.

    dq, dk `[tokens, HEADS, KEY_DIM]` (to be summed over the value heads of a key head); parts fp32 `[chunks, HEADS,
    PART_KINDS, CHUNK]`.
    """
    head, chunk = tl.program_id(0) // 2 % HEADS, (tl.program_id(0) // (2 * HEADS)).to(tl.int64)
    begin, stop = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    # Rows count from the chunk's first: 32 bits do, which saves registers.
    row = tl.arange(0, CHUNK)
    inside = row < stop - begin
    key_head = (head // GROUPS).to(tl.int64)
    place = chunk * HEADS + head
    token = begin.to(tl.int64)
    q += token * q_stride + key_head * q_head_stride
    k += token * k_stride + key_head * k_head_stride
    do += (token * HEADS + head) * VALUE_DIM
    u += (token * HEADS + head) * VALUE_DIM
    dv += (token * HEADS + head) * VALUE_DIM
    dq += (token * HEADS + head) * KEY_DIM
    dk += (token * HEADS + head) * KEY_DIM
    states += place * (KEY_DIM * VALUE_DIM)
    dstates += place * (KEY_DIM * VALUE_DIM)
    rows += place * (ROW_KINDS * CHUNK)
    parts += place * (PART_KINDS * CHUNK)
    value_stride: tl.constexpr = HEADS * VALUE_DIM
    key_stride: tl.constexpr = HEADS * KEY_DIM
    if tl.program_id(0) % 2 == 0:
        # One, which the compiler of more than four warps must not know.
        turns = 1 if WARPS <= 4 else tl.cdiv(stop - begin, CHUNK)
        _key_gradient(
            q, k, do, u, dv, states, dstates, rows, parts, dk, row, inside, turns,
            q_stride, k_stride, key_stride, value_stride, scale, KEY_DIM, WIDTH, VALUE_DIM, COLUMNS, CHUNK, PRECISION,
        )  # fmt: skip
    else:
        _query_gradient(
            q, k, do, u, states, dstates, rows, tl.load(ends + place), attention + place * (CHUNK * CHUNK), parts,
            dq, row, inside, q_stride, k_stride, key_stride, value_stride, scale,
            KEY_DIM, WIDTH, VALUE_DIM, COLUMNS, CHUNK, PRECISION,
        )  # fmt: skip


@kernel
def gate_gradient_kernel(
    a, b, a_log, dt_bias, parts, da, db, sums, chunks, a_stride, a_head_stride, b_stride, b_head_stride,
    HEADS: tl.constexpr, CHUNK: tl.constexpr, STRONGEST: tl.constexpr,
):  # fmt: skip
    """Of one chunk of one value head; da, db `[tokens, HEADS]`, sums fp32 `[2, chunks, HEADS]`: dA_log and ddt_bias."""
    head, chunk = tl.program_id(0) % HEADS, (tl.program_id(0) // HEADS).to(tl.int64)
    begin, stop = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    i = tl.arange(0, CHUNK)
    row = begin + i
    inside = row < stop
    place = chunk * HEADS + head
    parts += place * (PART_KINDS * CHUNK) + i
    rate, x, beta = gate_inputs(
        a, b, a_log, dt_bias, row, inside, head, a_stride, a_head_stride, b_stride, b_head_stride
    )  # fmt: skip
    g, beta = log_decay(rate, x, beta, inside, STRONGEST)
    read = tl.load(parts + PART_READ_Q * CHUNK) + tl.load(parts + PART_READ_K * CHUNK)
    written = tl.load(parts + PART_WRITTEN * CHUNK)
    dg = tl.load(parts + PART_Q * CHUNK) + tl.load(parts + PART_K * CHUNK)
    dg += tl.sum(tl.where(i[None, :] < i[:, None], written[None, :], read[None, :]), 1)
    # No write strength, no gradient of its logit.
    slope = tl.where(beta > 0.0, (1.0 - beta / STRONGEST) / tl.where(beta > 0.0, beta, 1.0), 0.0)
    places = row.to(tl.int64) * HEADS + head
    tl.store(db + places, (slope * tl.load(parts + PART_B * CHUNK)).to(db.dtype.element_ty), mask=inside)
    dx = dg * rate * tl.sigmoid(x)
    tl.store(da + places, dx.to(da.dtype.element_ty), mask=inside)
    tl.store(sums + place, tl.sum(dg * g, 0))
    tl.store(sums + tl.num_programs(0).to(tl.int64) + place, tl.sum(tl.where(inside, dx, 0.0), 0))
