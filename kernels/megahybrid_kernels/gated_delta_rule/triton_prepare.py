"""What the gated delta rule's chunks need before any state is known: gates, norms, the system's inverse, attention.

With G_i the sum of a chunk's log-decays up to token i, q and k normalised and D_ij = exp(G_i - G_j) for i >= j:

    L_ij = beta_i D_ij <k_i, k_j>  (i > j)        T = (I + L)^-1        A_ij = D_ij <q_i, k_j> Dk^-0.5

Every entry of T is a product of a key with contractions of another (Yang et al., arXiv 2406.06484, section 3), so none
exceeds 1, or beta's bound: T is found in fp16 products, which carry as many digits as tf32, when the inputs are half
precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megahybrid_kernels.activations import softplus
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.rows import load_rows

# Rows of what `prepare_kernel` leaves for each chunk and value head; places beyond the sequence neither read nor write.
READ_Q = tl.constexpr(0)  # exp(G) / |q| Dk^-0.5
READ_RATIO = tl.constexpr(1)  # what makes READ_K of READ_Q
WRITE = tl.constexpr(2)  # exp(G_end - G) / |k|
BETA = tl.constexpr(3)
# G is summed in float64 and kept as two fp32 numbers: beyond a strong decay one would lose the weak ones.
G_HIGH = tl.constexpr(4)
G_LOW = tl.constexpr(5)
NORM_Q = tl.constexpr(6)  # 1 / |q|
NORM_K = tl.constexpr(7)
READ_K = tl.constexpr(8)  # exp(G) / |k|
ROW_KINDS = tl.constexpr(9)


@triton.jit
def load_square(pointer, SIZE: tl.constexpr):
    """A contiguous `[SIZE, SIZE]` matrix."""
    i = tl.arange(0, SIZE)
    return tl.load(pointer + i[:, None] * SIZE + i[None, :])


@triton.jit
def gate_inputs(a, b, a_log, dt_bias, row, inside, head, a_stride, a_head_stride, b_stride, b_head_stride):
    """fp32: -exp(A_log), and `[rows]` a + dt_bias and b."""
    head = head.to(tl.int64)
    x = tl.load(a + row.to(tl.int64) * a_stride + head * a_head_stride, mask=inside, other=0).to(tl.float32)
    x += tl.load(dt_bias + head).to(tl.float32)
    rate = -tl.exp(tl.load(a_log + head).to(tl.float32))
    beta = tl.load(b + row.to(tl.int64) * b_stride + head * b_head_stride, mask=inside, other=0).to(tl.float32)
    return rate, x, beta


@triton.jit
def log_decay(rate, x, b, inside, STRONGEST: tl.constexpr):
    """fp32 `[rows]`, of `gate_inputs`: the log-decay g and beta, both 0 where not inside."""
    return tl.where(inside, rate * softplus(x), 0.0), tl.where(inside, STRONGEST * tl.sigmoid(b), 0.0)


@triton.jit
def decay_between(high_i, low_i, high_j, low_j, visible):
    """exp(G_i - G_j) where visible (i >= j, so that nothing overflows), else 0."""
    return tl.exp(tl.where(visible, (high_i - high_j) + (low_i - low_j), float("-inf")))


@triton.jit
def _unit_lower_inverse(lower, SIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + lower)^-1 of a strictly lower `[SIZE, SIZE]` matrix.

    From the inverses X of the diagonal blocks of one size follow those of twice the size: the part of `lower` between
    two neighbours, C, adds -X C X. Every X is part of the inverse itself, so nothing grows on the way. Blocks of X meet
    no others in X lower X, so that its part between neighbours is X C X without C being cut out.
    """
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, -lower, 0.0))
    narrow = lower.to(DOT)
    for level in tl.static_range(1, 7):
        if 2 << level <= SIZE:
            left = tl.dot(x.to(DOT), narrow, input_precision=PRECISION)
            added = tl.dot(left.to(DOT), x.to(DOT), input_precision=PRECISION)
            x = tl.where((i ^ j) >> level == 1, -added, x)
    return x


@kernel
def prepare_kernel(
    q, k, a, b, a_log, dt_bias, rows, ends, inverse, rest, attention, chunks,
    q_stride, q_head_stride, k_stride, k_head_stride, a_stride, a_head_stride, b_stride, b_head_stride, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STRONGEST: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head.

    Writes rows fp32 `[chunks, HEADS, ROW_KINDS, CHUNK]`, ends fp32 `[chunks, HEADS]` (the decay over the whole chunk),
    inverse (T), rest (T less inverse, unless None) and attention (A) `[chunks, HEADS, CHUNK, CHUNK]`.
    `chunks` int32 `[chunks, 2]`: first row, row after the last.
    """
    head, chunk = tl.program_id(0) % HEADS, (tl.program_id(0) // HEADS).to(tl.int64)
    begin, stop = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    # Rows count from the chunk's first: 32 bits do, which saves registers.
    i = tl.arange(0, CHUNK)
    inside = i < stop - begin
    token, key_head = begin.to(tl.int64), (head // GROUPS).to(tl.int64)
    k += token * k_stride + key_head * k_head_stride
    q += token * q_stride + key_head * q_head_stride
    rate, x, beta = gate_inputs(
        a, b, a_log, dt_bias, begin + i, inside, head, a_stride, a_head_stride, b_stride, b_head_stride
    )  # fmt: skip
    qk = tl.zeros([CHUNK, CHUNK], tl.float32)
    kk = tl.zeros([CHUNK, CHUNK], tl.float32)
    q_square = tl.zeros([CHUNK], tl.float32)
    for first in tl.range(0, KEY_DIM, COLUMNS):
        k_tile = load_rows(k, i, inside, k_stride, first, KEY_DIM, COLUMNS)
        q_tile = load_rows(q, i, inside, q_stride, first, KEY_DIM, COLUMNS)
        qk = tl.dot(q_tile, tl.trans(k_tile), qk, input_precision=PRECISION)
        kk = tl.dot(k_tile, tl.trans(k_tile), kk, input_precision=PRECISION)
        q_wide = q_tile.to(tl.float32)
        q_square += tl.sum(q_wide * q_wide, 1)
    k_square = tl.sum(tl.where(i[:, None] == i[None, :], kk, 0.0), 1)
    g, beta = log_decay(rate, x, beta, inside, STRONGEST)
    total = tl.cumsum(g.to(tl.float64), 0)
    high = total.to(tl.float32)
    low = (total - high.to(tl.float64)).to(tl.float32)
    end = tl.sum(g.to(tl.float64), 0)
    until_end = tl.exp((end - total).to(tl.float32))
    since_start = tl.exp(high)

    rows += (chunk * HEADS + head) * (ROW_KINDS * CHUNK) + i
    tl.store(rows + NORM_Q * CHUNK, tl.rsqrt(q_square + 1e-6))
    tl.store(rows + NORM_K * CHUNK, tl.rsqrt(k_square + 1e-6))
    tl.store(rows + BETA * CHUNK, beta)
    tl.store(rows + G_HIGH * CHUNK, high)
    tl.store(rows + G_LOW * CHUNK, low)
    tl.store(ends + chunk * HEADS + head, tl.exp(end.to(tl.float32)))
    # Through memory, which costs one wait; through shared memory every vector would cost two barriers a layout.
    tl.debug_barrier()
    q_norm, k_norm = tl.load(rows + NORM_Q * CHUNK), tl.load(rows + NORM_K * CHUNK)
    beta, high, low = tl.load(rows + BETA * CHUNK), tl.load(rows + G_HIGH * CHUNK), tl.load(rows + G_LOW * CHUNK)
    tl.store(rows + READ_Q * CHUNK, tl.where(inside, since_start * q_norm * scale, 0.0))
    tl.store(rows + READ_RATIO * CHUNK, k_norm / (q_norm * scale))
    tl.store(rows + READ_K * CHUNK, tl.where(inside, since_start * k_norm, 0.0))
    tl.store(rows + WRITE * CHUNK, tl.where(inside, until_end * k_norm, 0.0))

    place = (chunk * HEADS + head) * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
    between = decay_between(high[:, None], low[:, None], high[None, :], low[None, :], i[:, None] >= i[None, :])
    between *= k_norm[None, :]
    tl.store(attention + place, (qk * between * (q_norm * scale)[:, None]).to(attention.dtype.element_ty))
    lower = tl.where(i[:, None] > i[None, :], kk * between * (k_norm * beta)[:, None], 0.0)
    system = _unit_lower_inverse(lower, CHUNK, DOT, PRECISION)
    tl.store(inverse + place, system.to(inverse.dtype.element_ty))
    if rest is not None:
        left = system - system.to(inverse.dtype.element_ty).to(tl.float32)
        tl.store(rest + place, left.to(rest.dtype.element_ty))
