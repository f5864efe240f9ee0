"""Gradients of the gated delta rule's inputs, all chunks at once, from the states and what the scans leave.

With S before and dS' after a chunk, u and y of `triton_scan`, D, L and A of `triton_prepare`, q and k normalised and
s = Dk^-0.5:

    dq = s exp(G) do S^T + (s D do u^T) k
    dk = exp(G_end - G) u dS'^T - beta exp(G) y S^T + (s D do u^T)^T q + (N + N^T) k
    N  = -beta D y u^T below the diagonal
    dv = beta y              db = (1 - beta) <y, u>

(the last since dL = -y u^T and d beta_i = <y_i, x_i - sum_j L_ij u_j / beta_i> = <y_i, u_i> / beta_i). The log-decay
g_t acts wherever something passes token t. Summing just these terms, instead of gradients of G that have to cancel,
keeps the gradients of strong decays exact:

    dg_t = sum_{i >= t > j} (A_ij <do_i, u_j> - L_ij <y_i, u_j>)                      between tokens of the chunk
         + sum_{i >= t} <q_i, s exp(G) do S^T> - <k_i, beta exp(G) y S^T>             from the state before
         + sum_{j < t} <k_j, exp(G_end - G) u dS'^T> + exp(G_end) <S, dS'>            to the state after
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
    load_rows,
    load_square,
    log_decay,
    store_rows,
)


@triton.jit
def _gates(rows, CHUNK: tl.constexpr):
    """Both parts of G, and 1 / |q|, 1 / |k|."""
    i = tl.arange(0, CHUNK)
    high, low = tl.load(rows + G_HIGH * CHUNK + i), tl.load(rows + G_LOW * CHUNK + i)
    return high, low, tl.load(rows + NORM_Q * CHUNK + i), tl.load(rows + NORM_K * CHUNK + i)


@triton.jit
def _decay_to(high, low, CHUNK: tl.constexpr):
    """D."""
    i = tl.arange(0, CHUNK)
    return decay_between(high[:, None], low[:, None], high[None, :], low[None, :], i[:, None] >= i[None, :])


@triton.jit
def _decay_from(high, low, CHUNK: tl.constexpr):
    """D^T."""
    i = tl.arange(0, CHUNK)
    return decay_between(high[None, :], low[None, :], high[:, None], low[:, None], i[:, None] <= i[None, :])


@triton.jit
def gradient_kernel(
    q, k, a, b, a_log, dt_bias, rows, ends, attention, do, u, y, states, dstates, dq, dk, dv, da, db, sums, chunks,
    q_stride, q_head_stride, k_stride, k_head_stride, a_stride, a_head_stride, b_stride, b_head_stride, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head.

    dq, dk `[tokens, HEADS, KEY_DIM]` (to be summed over the value heads of a key head), dv `[tokens, HEADS,
    VALUE_DIM]`, da, db `[tokens, HEADS]`; sums fp32 `[2, chunks, HEADS]`: of dA_log and ddt_bias.
    """
    head, chunk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, stop = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    i = tl.arange(0, CHUNK)
    row = begin + i
    inside = row < stop
    key_head = (head // GROUPS).to(tl.int64)
    place = chunk * HEADS + head
    dtype = k.dtype.element_ty
    rate, x, g, beta = log_decay(
        a, b, a_log, dt_bias, row, inside, head, a_stride, a_head_stride, b_stride, b_head_stride
    )  # fmt: skip

    query, key = q + key_head * q_head_stride, k + key_head * k_head_stride
    value_stride: tl.constexpr = HEADS * VALUE_DIM
    do += head * VALUE_DIM
    u += head * VALUE_DIM
    y += head * VALUE_DIM

    # Pairs of tokens. Transposed products are computed anew: Triton below 3.7.1 miscompiles transposed results of
    # tl.dot on Hopper. One after the other, for want of registers.
    do_u = tl.zeros([CHUNK, CHUNK], tl.float32)
    u_do = tl.zeros([CHUNK, CHUNK], tl.float32)
    for first in tl.range(0, VALUE_DIM, COLUMNS):
        do_tile = load_rows(do, row, inside, value_stride, first, VALUE_DIM, COLUMNS)
        u_tile = load_rows(u, row, inside, value_stride, first, VALUE_DIM, COLUMNS)
        do_u = tl.dot(do_tile, tl.trans(u_tile), do_u, input_precision=PRECISION)
        u_do = tl.dot(u_tile, tl.trans(do_tile), u_do, input_precision=PRECISION)
    rows += place * (ROW_KINDS * CHUNK)
    high, low, q_norm, k_norm = _gates(rows, CHUNK)
    by_k = (u_do * _decay_from(high, low, CHUNK) * (scale * q_norm)[None, :]).to(dtype)
    by_q = (do_u * _decay_to(high, low, CHUNK) * (scale * k_norm)[None, :]).to(dtype)
    pairs = load_square(attention + place * (CHUNK * CHUNK), CHUNK).to(tl.float32) * do_u

    dbeta = tl.zeros([CHUNK], tl.float32)
    y_u = tl.zeros([CHUNK, CHUNK], tl.float32)
    u_y = tl.zeros([CHUNK, CHUNK], tl.float32)
    for first in tl.range(0, VALUE_DIM, COLUMNS):
        y_tile = load_rows(y, row, inside, value_stride, first, VALUE_DIM, COLUMNS)
        u_tile = load_rows(u, row, inside, value_stride, first, VALUE_DIM, COLUMNS)
        y_u = tl.dot(y_tile, tl.trans(u_tile), y_u, input_precision=PRECISION)
        u_y = tl.dot(u_tile, tl.trans(y_tile), u_y, input_precision=PRECISION)
        y_wide = y_tile.to(tl.float32)
        dbeta += tl.sum(y_wide * u_tile.to(tl.float32), 1)
        store_rows(
            dv + head * VALUE_DIM, beta[:, None] * y_wide, row, inside, value_stride, first, VALUE_DIM, COLUMNS
        )  # fmt: skip
    db_places = db + row.to(tl.int64) * HEADS + head
    tl.store(db_places, ((1.0 - beta) * dbeta).to(db.dtype.element_ty), mask=inside)
    high, low, q_norm, k_norm = _gates(rows, CHUNK)
    u_y *= tl.where(i[:, None] < i[None, :], -beta[None, :] * _decay_from(high, low, CHUNK), 0.0)
    y_u *= tl.where(i[:, None] > i[None, :], -beta[:, None] * _decay_to(high, low, CHUNK), 0.0)
    by_kk = ((y_u + u_y) * k_norm[None, :]).to(dtype)
    # In a loop: where one product is seen to enter another, the compiler gives eight warps the rows of sixteen.
    kk = tl.zeros([CHUNK, CHUNK], tl.float32)
    for first in tl.range(0, WIDTH, COLUMNS):
        k_part = load_rows(key, row, inside, k_stride, first, KEY_DIM, COLUMNS)
        kk = tl.dot(k_part, tl.trans(k_part), kk, input_precision=PRECISION)
    pairs += kk * y_u * k_norm[:, None] * k_norm[None, :]
    from_here = tl.where(i[:, None] <= i[None, :], 1.0, 0.0)
    across = tl.dot(from_here, pairs, input_precision=PRECISION)
    dg = tl.sum(tl.where(i[None, :] < i[:, None], across, 0.0), 1)

    # dq.
    dq_tile = tl.zeros([CHUNK, WIDTH], tl.float32)
    state_row = tl.arange(0, WIDTH)
    state_inside = state_row < KEY_DIM
    states += place * (KEY_DIM * VALUE_DIM)
    dstates += place * (KEY_DIM * VALUE_DIM)
    for first in tl.range(0, VALUE_DIM, COLUMNS):
        do_tile = load_rows(do, row, inside, value_stride, first, VALUE_DIM, COLUMNS)
        state = load_rows(states, state_row, state_inside, VALUE_DIM, first, VALUE_DIM, COLUMNS)
        dq_tile = tl.dot(do_tile, tl.trans(state), dq_tile, input_precision=PRECISION)
    since_start = tl.exp(high)
    q_tile = load_rows(query, row, inside, q_stride, 0, KEY_DIM, WIDTH)
    k_tile = load_rows(key, row, inside, k_stride, 0, KEY_DIM, WIDTH)
    q_wide = q_tile.to(tl.float32)
    dq_tile *= (scale * since_start)[:, None]
    read = q_norm * tl.sum(q_wide * dq_tile, 1)
    dq_tile = tl.dot(by_q, k_tile, dq_tile, input_precision=PRECISION)
    along = q_norm * q_norm * tl.sum(q_wide * dq_tile, 1)
    dq_tile = q_norm[:, None] * (dq_tile - along[:, None] * q_wide)
    store_rows(dq + head * KEY_DIM, dq_tile, row, inside, HEADS * KEY_DIM, 0, KEY_DIM, WIDTH)

    # dk.
    dread = tl.zeros([CHUNK, WIDTH], tl.float32)
    dk_tile = tl.zeros([CHUNK, WIDTH], tl.float32)
    passed = tl.zeros([WIDTH], tl.float32)
    for first in tl.range(0, VALUE_DIM, COLUMNS):
        y_tile = load_rows(y, row, inside, value_stride, first, VALUE_DIM, COLUMNS)
        state = load_rows(states, state_row, state_inside, VALUE_DIM, first, VALUE_DIM, COLUMNS)
        dread = tl.dot(y_tile, tl.trans(state), dread, input_precision=PRECISION)
        u_tile = load_rows(u, row, inside, value_stride, first, VALUE_DIM, COLUMNS)
        dstate = load_rows(dstates, state_row, state_inside, VALUE_DIM, first, VALUE_DIM, COLUMNS)
        dk_tile = tl.dot(u_tile, tl.trans(dstate), dk_tile, input_precision=PRECISION)
        passed += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    k_wide = load_rows(key, row, inside, k_stride, 0, KEY_DIM, WIDTH).to(tl.float32)
    read -= beta * since_start * k_norm * tl.sum(k_wide * dread, 1)
    end_high, end_low = tl.load(rows + G_HIGH * CHUNK + CHUNK - 1), tl.load(rows + G_LOW * CHUNK + CHUNK - 1)
    until_end = decay_between(end_high, end_low, high, low, inside)
    written = until_end * k_norm * tl.sum(k_wide * dk_tile, 1)
    dk_tile = until_end[:, None] * dk_tile - (beta * since_start)[:, None] * dread
    # Of one turn, for the same reason as above.
    for _ in tl.range(0, tl.cdiv(stop - begin, CHUNK)):
        q_tile = load_rows(query, row, inside, q_stride, 0, KEY_DIM, WIDTH)
        dk_tile = tl.dot(by_k, q_tile, dk_tile, input_precision=PRECISION)
    k_tile = load_rows(key, row, inside, k_stride, 0, KEY_DIM, WIDTH)
    dk_tile = tl.dot(by_kk, k_tile, dk_tile, input_precision=PRECISION)
    k_wide = k_tile.to(tl.float32)
    along = k_norm * k_norm * tl.sum(k_wide * dk_tile, 1)
    dk_tile = k_norm[:, None] * (dk_tile - along[:, None] * k_wide)
    store_rows(dk + head * KEY_DIM, dk_tile, row, inside, HEADS * KEY_DIM, 0, KEY_DIM, WIDTH)

    dg += tl.sum(tl.where(i[None, :] < i[:, None], written[None, :], read[None, :]), 1)
    dg += tl.load(ends + place) * tl.sum(passed, 0)
    dx = dg * rate * tl.sigmoid(x)
    tl.store(da + row.to(tl.int64) * HEADS + head, dx.to(da.dtype.element_ty), mask=inside)
    tl.store(sums + place, tl.sum(dg * g, 0))
    tl.store(sums + tl.num_programs(1).to(tl.int64) * HEADS + place, tl.sum(tl.where(inside, dx, 0.0), 0))
