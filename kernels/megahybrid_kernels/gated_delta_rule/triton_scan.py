"""The scans over chunks of the gated delta rule, where a state [Dk, Dv] passes from one chunk to the next.

With r_q, r_k, w and T, A of `triton_prepare`, a chunk that finds the state S leaves S' and its outputs:

    u  = T (beta v - r_k k S)           o  = r_q q S + A u           S' = exp(G_end) S + k^T (w u)

(r_q, r_k, w, beta scale rows; q and k are as they came). Backward, from dS' and do:

    du = A^T do + w k dS'       y = T^T du       dv = beta y       dS = exp(G_end) dS' + q^T (r_q do) - k^T (r_k y)

Columns of S do not meet: a program owns some of them. Few long sequences are cut into segments whose states are found
first: a segment maps S to M S + B, where B is its last state from S = 0, and M its last state from S = I with v = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megahybrid_kernels.gated_delta_rule.triton_prepare import (
    BETA,
    READ_K,
    READ_Q,
    ROW_KINDS,
    WRITE,
    load_rows,
    load_square,
    store_rows,
)


@triton.jit
def _load_state(
    pointer, first, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.arange(0, WIDTH)
    return load_rows(pointer, row, row < KEY_DIM, VALUE_DIM, first, VALUE_DIM, COLUMNS).to(tl.float32)


@triton.jit
def _store_state(
    pointer, state, first, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.arange(0, WIDTH)
    store_rows(pointer, state, row, row < KEY_DIM, VALUE_DIM, first, VALUE_DIM, COLUMNS)


@triton.jit
def scan_kernel(
    q, k, v, rows, ends, inverse, attention, initial, o, u, states, final, segments,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of one segment's state, chunk by chunk; `segments` int32 `[segments, 3]`: rows begin, stop, first chunk.

    Each of o, u `[tokens, HEADS, VALUE_DIM]`, states `[chunks, HEADS, KEY_DIM, VALUE_DIM]` (before each chunk) and
    final `[segments, HEADS, KEY_DIM, VALUE_DIM]` is written unless None. initial, laid out as final, is zero when
    None. Without v the values are zero and the scan starts from the identity (VALUE_DIM is KEY_DIM).
    """
    first = tl.program_id(0) * COLUMNS
    segment, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    begin, stop = tl.load(segments + 3 * segment), tl.load(segments + 3 * segment + 1)
    chunk = tl.load(segments + 3 * segment + 2).to(tl.int64) * HEADS + head
    key_head = (head // GROUPS).to(tl.int64)
    q += key_head * q_head_stride
    k += key_head * k_head_stride
    place = tl.arange(0, CHUNK)
    state_size: tl.constexpr = KEY_DIM * VALUE_DIM
    if v is None:
        state = (tl.arange(0, WIDTH)[:, None] == first + tl.arange(0, COLUMNS)[None, :]).to(tl.float32)
    elif initial is None:
        state = tl.zeros([WIDTH, COLUMNS], tl.float32)
    else:
        state = _load_state(
            initial + (segment * HEADS + head) * state_size, first, KEY_DIM, VALUE_DIM, WIDTH, COLUMNS
        )  # fmt: skip
    dtype = k.dtype.element_ty
    for start in tl.range(begin, stop, CHUNK):
        row = start + place
        inside = row < stop
        k_tile = load_rows(k, row, inside, k_stride, 0, KEY_DIM, WIDTH)
        system = load_square(inverse + chunk * (CHUNK * CHUNK), CHUNK)
        scales = rows + chunk * (ROW_KINDS * CHUNK) + place
        read_k = tl.load(scales + READ_K * CHUNK)
        write = tl.load(scales + WRITE * CHUNK)
        # Not fetched ahead by the compiler's pipeline: asked for early instead.
        decay = tl.load(ends + chunk)
        if o is not None:
            read_q = tl.load(scales + READ_Q * CHUNK)
        narrow = state.to(dtype)
        if states is not None:
            _store_state(states + chunk * state_size, narrow, first, KEY_DIM, VALUE_DIM, WIDTH, COLUMNS)
        error = -read_k[:, None] * tl.dot(k_tile, narrow, input_precision=PRECISION)
        if v is not None:
            v_tile = load_rows(v + head.to(tl.int64) * v_head_stride, row, inside, v_stride, first, VALUE_DIM, COLUMNS)
            error += tl.load(scales + BETA * CHUNK)[:, None] * v_tile.to(tl.float32)
        written = tl.dot(system, error.to(dtype), input_precision=PRECISION)
        if u is not None:
            store_rows(u + head * VALUE_DIM, written, row, inside, HEADS * VALUE_DIM, first, VALUE_DIM, COLUMNS)
        if o is not None:
            q_tile = load_rows(q, row, inside, q_stride, 0, KEY_DIM, WIDTH)
            output = read_q[:, None] * tl.dot(q_tile, narrow, input_precision=PRECISION)
            pairs = load_square(attention + chunk * (CHUNK * CHUNK), CHUNK)
            output = tl.dot(pairs, written.to(dtype), output, input_precision=PRECISION)
            store_rows(o + head * VALUE_DIM, output, row, inside, HEADS * VALUE_DIM, first, VALUE_DIM, COLUMNS)
        state *= decay
        state = tl.dot(tl.trans(k_tile), (write[:, None] * written).to(dtype), state, input_precision=PRECISION)
        chunk += HEADS
    if final is not None:
        _store_state(
            final + (segment * HEADS + head) * state_size, state, first, KEY_DIM, VALUE_DIM, WIDTH, COLUMNS
        )  # fmt: skip


@triton.jit
def _solve(system, du, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """system^T du, fp32. Where keys repeat so does du, and T^T takes its differences: half precision has too few digits
    of du, and bf16 of T as well, so that each comes in two parts.
    """
    system = tl.trans(system)
    if dtype == tl.float32:
        return tl.dot(system, du, input_precision=PRECISION)
    system = system.to(tl.float32)
    system_high, du_high = system.to(dtype), du.to(dtype)
    solved = tl.dot(system_high, du_high)
    if dtype == tl.bfloat16:
        solved = tl.dot((system - system_high.to(tl.float32)).to(dtype), du_high, solved)
    return tl.dot(system_high, (du - du_high.to(tl.float32)).to(dtype), solved)


@triton.jit
def reverse_scan_kernel(
    q, k, do, rows, ends, inverse, attention, dfinal, dv, dstates, dinitial, segments,
    q_stride, q_head_stride, k_stride, k_head_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient's way back through one segment; do, dv as o, dstates (after each chunk) as states of `scan_kernel`.

    dv and dstates are written unless None; dfinal is zero when None. inverse is fp16 where the others are bf16.
    """
    first = tl.program_id(0) * COLUMNS
    segment, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    begin, stop = tl.load(segments + 3 * segment), tl.load(segments + 3 * segment + 1)
    count = tl.cdiv(stop - begin, CHUNK)
    chunk = (tl.load(segments + 3 * segment + 2).to(tl.int64) + count - 1) * HEADS + head
    key_head = (head // GROUPS).to(tl.int64)
    q += key_head * q_head_stride
    k += key_head * k_head_stride
    place = tl.arange(0, CHUNK)
    state_size: tl.constexpr = KEY_DIM * VALUE_DIM
    if dfinal is None:
        dstate = tl.zeros([WIDTH, COLUMNS], tl.float32)
    else:
        dstate = _load_state(
            dfinal + (segment * HEADS + head) * state_size, first, KEY_DIM, VALUE_DIM, WIDTH, COLUMNS
        )  # fmt: skip
    dtype = k.dtype.element_ty
    for step in tl.range(0, count):
        row = begin + (count - 1 - step) * CHUNK + place
        inside = row < stop
        k_tile = load_rows(k, row, inside, k_stride, 0, KEY_DIM, WIDTH)
        q_tile = load_rows(q, row, inside, q_stride, 0, KEY_DIM, WIDTH)
        do_tile = load_rows(do + head * VALUE_DIM, row, inside, HEADS * VALUE_DIM, first, VALUE_DIM, COLUMNS)
        system = load_square(inverse + chunk * (CHUNK * CHUNK), CHUNK)
        pairs = load_square(attention + chunk * (CHUNK * CHUNK), CHUNK)
        scales = rows + chunk * (ROW_KINDS * CHUNK) + place
        read_q = tl.load(scales + READ_Q * CHUNK)
        read_k = tl.load(scales + READ_K * CHUNK)
        write = tl.load(scales + WRITE * CHUNK)
        decay = tl.load(ends + chunk)
        narrow = dstate.to(dtype)
        if dstates is not None:
            _store_state(dstates + chunk * state_size, narrow, first, KEY_DIM, VALUE_DIM, WIDTH, COLUMNS)
        du = write[:, None] * tl.dot(k_tile, narrow, input_precision=PRECISION)
        du = tl.dot(tl.trans(pairs), do_tile, du, input_precision=PRECISION)
        solved = _solve(system, du, dtype, PRECISION)
        if dv is not None:
            write_v = tl.load(scales + BETA * CHUNK)[:, None] * solved
            store_rows(dv + head * VALUE_DIM, write_v, row, inside, HEADS * VALUE_DIM, first, VALUE_DIM, COLUMNS)
        dstate *= decay
        scaled = (read_q[:, None] * do_tile.to(tl.float32)).to(dtype)
        dstate = tl.dot(tl.trans(q_tile), scaled, dstate, input_precision=PRECISION)
        dstate = tl.dot(tl.trans(k_tile), (-read_k[:, None] * solved).to(dtype), dstate, input_precision=PRECISION)
        chunk -= HEADS
    if dinitial is not None:
        _store_state(
            dinitial + (segment * HEADS + head) * state_size, dstate, first, KEY_DIM, VALUE_DIM, WIDTH, COLUMNS
        )  # fmt: skip


@triton.jit
def join_kernel(
    transfer, own, start, states, last, bounds,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From each segment's map to the state that it starts from: states[n + 1] = transfer[n] states[n] + own[n].

    All fp32: transfer `[segments, HEADS, KEY_DIM, KEY_DIM]`; own, states as `scan_kernel`'s final; start and last
    `[sequences, ..]`. Sequence n has the segments from bounds[n] to before bounds[n + 1]. start is zero when None.
    REVERSE goes from the last segment to the first with the transposed maps.
    """
    first = tl.program_id(0) * COLUMNS
    sequence, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    begin, stop = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    state_size: tl.constexpr = KEY_DIM * VALUE_DIM
    last += (sequence * HEADS + head) * state_size
    if start is None:
        state = tl.zeros([WIDTH, COLUMNS], tl.float32)
    else:
        state = _load_state(
            start + (sequence * HEADS + head) * state_size, first, KEY_DIM, VALUE_DIM, WIDTH, COLUMNS
        )  # fmt: skip
    column = tl.arange(0, WIDTH)
    for step in tl.range(0, stop - begin):
        segment = (stop - 1 - step if REVERSE else begin + step).to(tl.int64) * HEADS + head
        _store_state(states + segment * state_size, state, first, KEY_DIM, VALUE_DIM, WIDTH, COLUMNS)
        maps = transfer + segment * (KEY_DIM * KEY_DIM)
        # A whole map does not fit next to a state: the new one comes row by row, and back through memory.
        for first_row in tl.range(0, WIDTH, ROWS):
            row = first_row + tl.arange(0, ROWS)
            square = (row < KEY_DIM)[:, None] & (column < KEY_DIM)[None, :]
            places = row[:, None] * (1 if REVERSE else KEY_DIM) + column[None, :] * (KEY_DIM if REVERSE else 1)
            moved = tl.load(maps + places, mask=square, other=0)
            added = load_rows(own + segment * state_size, row, row < KEY_DIM, VALUE_DIM, first, VALUE_DIM, COLUMNS)
            added = tl.dot(moved, state, added, input_precision=PRECISION)
            store_rows(last, added, row, row < KEY_DIM, VALUE_DIM, first, VALUE_DIM, COLUMNS)
        tl.debug_barrier()
        state = _load_state(last, first, KEY_DIM, VALUE_DIM, WIDTH, COLUMNS)
        tl.debug_barrier()
