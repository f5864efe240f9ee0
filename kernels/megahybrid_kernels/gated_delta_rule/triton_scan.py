"""The scans over chunks of the gated delta rule, where a state [Dk, Dv] passes from one chunk to the next.

With r_q, r_k, w and T, A of `triton_prepare`, a chunk that finds the state S leaves S' and its outputs:

    u  = T beta (v - r_k k S)           o  = r_q q S + A u           S' = exp(G_end) S + k^T (w u)

(r_q, r_k, w, beta scale rows; q and k are as they came). Backward, from dS' and do:

    du = A^T do + w k dS'       y = T^T du       dv = beta y       dS = exp(G_end) dS' + q^T (r_q do) - k^T (r_k dv)

Columns of S do not meet: a program owns some of them and holds them transposed, `[COLUMNS, keys]`, so that all it
computes is transposed and each product's result, still in registers, is the next one's left operand. Beyond 128 keys
the state is in two halves. Few long sequences are cut into segments whose states are found first: a segment maps S to
M S + B, where B is its last state from S = 0, and M its last state from S = I with v = 0.

Where keys repeat, k S and k dS' are small beside S and dS', T takes differences of like numbers, and roundings of a
chunk's like writes add up: bf16 has too few digits. Scans whose states backward uses take u, what the states gain, dS'
and du in two parts, and T as inverse + rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megahybrid_kernels.gated_delta_rule.triton_prepare import (
    BETA,
    READ_K,
    READ_Q,
    READ_RATIO,
    ROW_KINDS,
    WRITE,
    load_square,
)
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.rows import load_rows, store_rows


@triton.jit
def _own_columns(VALUE_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's first column, and the number of its pair of a segment (or sequence) and a head."""
    blocks: tl.constexpr = (VALUE_DIM + COLUMNS - 1) // COLUMNS
    return tl.program_id(0) % blocks * COLUMNS, tl.program_id(0) // blocks


@triton.jit
def _load_across(pointer, row, inside, stride, first, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """`load_rows`, transposed: `[WIDTH, rows]`."""
    column = first + tl.arange(0, WIDTH)
    mask = inside[None, :]
    if DIM % WIDTH != 0:
        mask = mask & (column < DIM)[:, None]
    return tl.load(pointer + row[None, :] * stride + column[:, None], mask=mask, other=0)


@triton.jit
def _store_across(pointer, x, row, inside, stride, first, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `_load_across`, in the array's dtype."""
    column = first + tl.arange(0, WIDTH)
    mask = inside[None, :]
    if DIM % WIDTH != 0:
        mask = mask & (column < DIM)[:, None]
    places = pointer + row[None, :] * stride + column[:, None]
    tl.store(places, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _initial(
    pointer, IDENTITY: tl.constexpr, start: tl.constexpr, first, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Keys from `start` of S^T, fp32 `[COLUMNS, WIDTH]`: the identity, what `pointer` has, or 0 where that is None."""
    key = start + tl.arange(0, WIDTH)
    if IDENTITY:
        state = (key[None, :] == first + tl.arange(0, COLUMNS)[:, None]).to(tl.float32)
    elif pointer is None:
        state = tl.zeros([COLUMNS, WIDTH], tl.float32)
    else:
        state = _load_across(pointer, key, key < KEY_DIM, VALUE_DIM, first, VALUE_DIM, COLUMNS).to(tl.float32)
    return state


@triton.jit
def _leave(
    pointer, state, start: tl.constexpr, first, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The inverse of `_initial`."""
    key = start + tl.arange(0, WIDTH)
    _store_across(pointer, state, key, key < KEY_DIM, VALUE_DIM, first, VALUE_DIM, COLUMNS)


@triton.jit
def _store_block(
    pointer, x, first_row, first_column, ROW_DIM: tl.constexpr, COLUMN_DIM: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """x `[ROWS, COLUMNS]` into a matrix `[ROW_DIM, COLUMN_DIM]`."""
    row = first_row + tl.arange(0, ROWS)
    store_rows(pointer, x, row, row < ROW_DIM, COLUMN_DIM, first_column, COLUMN_DIM, COLUMNS)


@triton.jit
def _dot(x, y, total, PRECISE: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x y + total; PRECISE: with x in two parts, where y is half precision."""
    if PRECISE and dtype != tl.float32:
        # Cut rather than rounded: one instruction an element.
        digits: tl.constexpr = -65536 if dtype == tl.bfloat16 else -8192
        high = (x.to(tl.int32, bitcast=True) & digits).to(tl.float32, bitcast=True)
        total = tl.dot(high.to(dtype), y, total)
        total = tl.dot((x - high).to(dtype), y, total)
    else:
        total = tl.dot(x.to(dtype), y, total, input_precision=PRECISION)
    return total


@kernel
def scan_kernel(
    q, k, v, rows, ends, inverse, rest, attention, initial, o, u, states, final, segments,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Columns of one segment's state, chunk by chunk; `segments` int32 `[segments, 3]`: rows begin, stop, first chunk.

    Each of o, u `[tokens, HEADS, VALUE_DIM]`, states `[chunks, HEADS, VALUE_DIM, KEY_DIM]` (S^T before each chunk) and
    final `[segments, HEADS, KEY_DIM, VALUE_DIM]` is written unless None. initial, laid out as final, is zero when
    None. Without v the values are zero and the scan starts from the identity (VALUE_DIM is KEY_DIM). o comes from
    sums in one part, all else in two. ROW is the type of rows' numbers.
    """
    first, pair = _own_columns(VALUE_DIM, COLUMNS)
    segment, head = (pair // HEADS).to(tl.int64), pair % HEADS
    begin, stop = tl.load(segments + 3 * segment), tl.load(segments + 3 * segment + 1)
    chunk = tl.load(segments + 3 * segment + 2).to(tl.int64) * HEADS + head
    key_head = (head // GROUPS).to(tl.int64)
    q += key_head * q_head_stride
    k += key_head * k_head_stride
    place = tl.arange(0, CHUNK)
    state_size: tl.constexpr = KEY_DIM * VALUE_DIM
    HALF: tl.constexpr = min(WIDTH, 128)
    if initial is not None:
        initial += pair.to(tl.int64) * state_size
    state = _initial(initial, v is None, 0, first, KEY_DIM, HALF, VALUE_DIM, COLUMNS)
    if WIDTH > HALF:
        other = _initial(initial, v is None, HALF, first, KEY_DIM, HALF, VALUE_DIM, COLUMNS)
    dtype = k.dtype.element_ty
    # Values come out of shared memory in the products' layout by a product.
    identity = tl.where(place[:, None] == place[None, :], 1.0, 0.0).to(dtype)
    for start in tl.range(begin, stop, CHUNK):
        row = (start + place).to(ROW)
        inside = row < stop
        system = load_square(inverse + chunk * (CHUNK * CHUNK), CHUNK)
        scales = rows + chunk * (ROW_KINDS * CHUNK) + place
        # Not fetched ahead by the compiler's pipeline: asked for early instead.
        decay = tl.load(ends + chunk)
        k_tile = load_rows(k, row, inside, k_stride, 0, KEY_DIM, HALF)
        narrow = state.to(dtype)
        error = tl.dot(narrow, tl.trans(k_tile), input_precision=PRECISION)
        if states is not None:
            _store_block(states + chunk * state_size, narrow, first, 0, VALUE_DIM, KEY_DIM, COLUMNS, HALF)
        if WIDTH > HALF:
            k_other = load_rows(k, row, inside, k_stride, HALF, KEY_DIM, HALF)
            narrow = other.to(dtype)
            error = tl.dot(narrow, tl.trans(k_other), error, input_precision=PRECISION)
            if states is not None:
                _store_block(states + chunk * state_size, narrow, first, HALF, VALUE_DIM, KEY_DIM, COLUMNS, HALF)
        if o is None:
            read_k = tl.load(scales + READ_K * CHUNK)
        else:
            # Only what leads to a product's operand is fetched ahead: read_q does so by way of read_k.
            read_q = tl.load(scales + READ_Q * CHUNK)
            read_k = read_q * tl.load(scales + READ_RATIO * CHUNK)
        error *= read_k[None, :]
        if v is None:
            error = -error
        else:
            v_tile = _load_across(
                v + head.to(tl.int64) * v_head_stride, row, inside, v_stride, first, VALUE_DIM, COLUMNS
            )  # fmt: skip
            if dtype != tl.float32:
                v_tile = tl.dot(v_tile, identity)
            error = v_tile - error
        error *= tl.load(scales + BETA * CHUNK)[None, :]
        written = tl.zeros([COLUMNS, CHUNK], tl.float32)
        if rest is not None:
            written = tl.dot(error.to(dtype), tl.trans(load_square(rest + chunk * (CHUNK * CHUNK), CHUNK)), written)
        written = _dot(error, tl.trans(system), written, rest is not None, dtype, PRECISION)
        if u is not None:
            _store_across(u + head * VALUE_DIM, written, row, inside, HEADS * VALUE_DIM, first, VALUE_DIM, COLUMNS)
        if o is not None:
            q_tile = load_rows(q, row, inside, q_stride, 0, KEY_DIM, HALF)
            output = tl.dot(state.to(dtype), tl.trans(q_tile), input_precision=PRECISION)
            if WIDTH > HALF:
                q_other = load_rows(q, row, inside, q_stride, HALF, KEY_DIM, HALF)
                output = tl.dot(other.to(dtype), tl.trans(q_other), output, input_precision=PRECISION)
            pairs = load_square(attention + chunk * (CHUNK * CHUNK), CHUNK)
            output = tl.dot(written.to(dtype), tl.trans(pairs), read_q[None, :] * output, input_precision=PRECISION)
            _store_across(o + head * VALUE_DIM, output, row, inside, HEADS * VALUE_DIM, first, VALUE_DIM, COLUMNS)
        kept = tl.load(scales + WRITE * CHUNK)[None, :] * written
        state = _dot(kept, k_tile, state * decay, o is None, dtype, PRECISION)
        if WIDTH > HALF:
            other = _dot(kept, k_other, other * decay, o is None, dtype, PRECISION)
        chunk += HEADS
    if final is not None:
        final += pair.to(tl.int64) * state_size
        _leave(final, state, 0, first, KEY_DIM, HALF, VALUE_DIM, COLUMNS)
        if WIDTH > HALF:
            _leave(final, other, HALF, first, KEY_DIM, HALF, VALUE_DIM, COLUMNS)


@kernel
def reverse_scan_kernel(
    q, k, do, rows, ends, inverse, rest, attention, dfinal, dv, dstates, dinitial, segments,
    q_stride, q_head_stride, k_stride, k_head_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """The gradient's way back through one segment; do, dv as o, dstates (after each chunk) as states of `scan_kernel`.

    dv and dstates are written unless None; dfinal is zero when None.
    """
    first, pair = _own_columns(VALUE_DIM, COLUMNS)
    segment, head = (pair // HEADS).to(tl.int64), pair % HEADS
    begin, stop = tl.load(segments + 3 * segment), tl.load(segments + 3 * segment + 1)
    count = tl.cdiv(stop - begin, CHUNK)
    chunk = (tl.load(segments + 3 * segment + 2).to(tl.int64) + count - 1) * HEADS + head
    key_head = (head // GROUPS).to(tl.int64)
    q += key_head * q_head_stride
    k += key_head * k_head_stride
    place = tl.arange(0, CHUNK)
    state_size: tl.constexpr = KEY_DIM * VALUE_DIM
    HALF: tl.constexpr = min(WIDTH, 128)
    if dfinal is not None:
        dfinal += pair.to(tl.int64) * state_size
    dstate = _initial(dfinal, False, 0, first, KEY_DIM, HALF, VALUE_DIM, COLUMNS)
    if WIDTH > HALF:
        other = _initial(dfinal, False, HALF, first, KEY_DIM, HALF, VALUE_DIM, COLUMNS)
    dtype = k.dtype.element_ty
    for step in tl.range(0, count):
        row = (begin + (count - 1 - step) * CHUNK + place).to(ROW)
        inside = row < stop
        do_tile = _load_across(do + head * VALUE_DIM, row, inside, HEADS * VALUE_DIM, first, VALUE_DIM, COLUMNS)
        system = load_square(inverse + chunk * (CHUNK * CHUNK), CHUNK)
        pairs = load_square(attention + chunk * (CHUNK * CHUNK), CHUNK)
        scales = rows + chunk * (ROW_KINDS * CHUNK) + place
        decay = tl.load(ends + chunk)
        k_tile = load_rows(k, row, inside, k_stride, 0, KEY_DIM, HALF)
        if dstates is not None:
            _store_block(dstates + chunk * state_size, dstate, first, 0, VALUE_DIM, KEY_DIM, COLUMNS, HALF)
            if WIDTH > HALF:
                _store_block(dstates + chunk * state_size, other, first, HALF, VALUE_DIM, KEY_DIM, COLUMNS, HALF)
        du = tl.zeros([COLUMNS, CHUNK], tl.float32)
        du = _dot(dstate, tl.trans(k_tile), du, True, dtype, PRECISION)
        if WIDTH > HALF:
            k_other = load_rows(k, row, inside, k_stride, HALF, KEY_DIM, HALF)
            du = _dot(other, tl.trans(k_other), du, True, dtype, PRECISION)
        scaled = (tl.load(scales + READ_Q * CHUNK)[None, :] * do_tile.to(tl.float32)).to(dtype)
        q_tile = load_rows(q, row, inside, q_stride, 0, KEY_DIM, HALF)
        dstate = tl.dot(scaled, q_tile, dstate * decay, input_precision=PRECISION)
        if WIDTH > HALF:
            q_other = load_rows(q, row, inside, q_stride, HALF, KEY_DIM, HALF)
            other = tl.dot(scaled, q_other, other * decay, input_precision=PRECISION)
        du *= -tl.load(scales + WRITE * CHUNK)[None, :]
        du = tl.dot(do_tile, pairs, input_precision=PRECISION) - du
        solved = tl.zeros([COLUMNS, CHUNK], tl.float32)
        if rest is not None:
            solved = tl.dot(du.to(dtype), load_square(rest + chunk * (CHUNK * CHUNK), CHUNK), solved)
        solved = _dot(du, system, solved, True, dtype, PRECISION)
        solved *= tl.load(scales + BETA * CHUNK)[None, :]
        if dv is not None:
            _store_across(dv + head * VALUE_DIM, solved, row, inside, HEADS * VALUE_DIM, first, VALUE_DIM, COLUMNS)
        taken = -tl.load(scales + READ_K * CHUNK)[None, :] * solved
        dstate = _dot(taken, k_tile, dstate, True, dtype, PRECISION)
        if WIDTH > HALF:
            other = _dot(taken, k_other, other, True, dtype, PRECISION)
        chunk -= HEADS
    if dinitial is not None:
        dinitial += pair.to(tl.int64) * state_size
        _leave(dinitial, dstate, 0, first, KEY_DIM, HALF, VALUE_DIM, COLUMNS)
        if WIDTH > HALF:
            _leave(dinitial, other, HALF, first, KEY_DIM, HALF, VALUE_DIM, COLUMNS)


@triton.jit
def _load_state(
    pointer, first, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.arange(0, WIDTH)
    return load_rows(pointer, row, row < KEY_DIM, VALUE_DIM, first, VALUE_DIM, COLUMNS).to(tl.float32)


@kernel
def join_kernel(
    transfer, own, start, states, last, bounds,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From each segment's map to the state that it starts from: states[n + 1] = transfer[n] states[n] + own[n].

    All fp32: transfer `[segments, HEADS, KEY_DIM, KEY_DIM]`; own, states as `scan_kernel`'s final; start and last
    `[sequences, ..]`. Sequence n has the segments from bounds[n] to before bounds[n + 1]. start is zero when None.
    REVERSE goes from the last segment to the first with the transposed maps. Where keys repeat a map takes nearly all
    of a key's direction from a state: tf32 has too few digits.
    """
    first, pair = _own_columns(VALUE_DIM, COLUMNS)
    sequence, head = (pair // HEADS).to(tl.int64), pair % HEADS
    begin, stop = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    state_size: tl.constexpr = KEY_DIM * VALUE_DIM
    last += pair.to(tl.int64) * state_size
    if start is None:
        state = tl.zeros([WIDTH, COLUMNS], tl.float32)
    else:
        state = _load_state(
            start + pair.to(tl.int64) * state_size, first, KEY_DIM, VALUE_DIM, WIDTH, COLUMNS
        )  # fmt: skip
    column = tl.arange(0, WIDTH)
    for step in tl.range(0, stop - begin):
        segment = (stop - 1 - step if REVERSE else begin + step).to(tl.int64) * HEADS + head
        _store_block(states + segment * state_size, state, 0, first, KEY_DIM, VALUE_DIM, WIDTH, COLUMNS)
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
