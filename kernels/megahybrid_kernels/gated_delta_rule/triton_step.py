"""One step of the gated delta rule: one new token of every sequence, the memory updated in place.

The memory is read once and written once, `8 Dk Dv` bytes a sequence and value head, and all else is small beside it: a
step is bound by bandwidth. Of the state S before the step only S^T k and S^T q are needed, in one pass over the tile
that a program holds in registers:

    u = beta (v - alpha S^T k),   S' = alpha S + k u^T,   o = S'^T q = alpha S^T q + (k . q) u

so a program takes all rows of some columns of a memory, and columns need nothing of each other.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.activations import softplus
from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.integers import cdiv, next_power_of_2
from megahybrid_kernels.launch import kernel

# Programs that fill a GPU of some hundred multiprocessors; fewer memories are cut into narrower blocks of columns.
_PROGRAMS = 512
# The widest block reads 128 bytes of a row at once, the narrowest one sector.
_WIDEST, _NARROWEST = 32, 8


@kernel
def _step(
    q, k, v, a, b, A_log, dt_bias, state, o, q_stride, k_stride, v_stride, a_stride, b_stride, heads, groups, q_scale,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    STRONGEST: tl.constexpr,
):  # fmt: skip
    """`COLUMNS` columns of the memory of a value head."""
    blocks: tl.constexpr = (VALUE_DIM + COLUMNS - 1) // COLUMNS
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, sequence = pair % heads, (pair // heads).to(tl.int64)
    row, column = tl.arange(0, KEY_WIDTH), block * COLUMNS + tl.arange(0, COLUMNS)
    in_row, in_column = row < KEY_DIM, column < VALUE_DIM
    mask = in_row[:, None] & in_column[None, :]
    places = (sequence * heads + head) * (KEY_DIM * VALUE_DIM) + row[:, None] * VALUE_DIM + column[None, :]
    before = tl.load(state + places, mask=mask, other=0)

    at = (head // groups) * KEY_DIM + row
    q_row = tl.load(q + sequence * q_stride + at, mask=in_row, other=0).to(tl.float32)
    k_row = tl.load(k + sequence * k_stride + at, mask=in_row, other=0).to(tl.float32)
    q_row = q_row * (q_scale / tl.sqrt(tl.sum(q_row * q_row, 0) + 1e-6))
    k_row = k_row / tl.sqrt(tl.sum(k_row * k_row, 0) + 1e-6)
    v_row = tl.load(v + sequence * v_stride + head * VALUE_DIM + column, mask=in_column, other=0).to(tl.float32)

    x = tl.load(a + sequence * a_stride + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    rate = softplus(x)
    alpha = tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * rate)
    beta = STRONGEST * tl.sigmoid(tl.load(b + sequence * b_stride + head).to(tl.float32))

    read_k = tl.sum(before * k_row[:, None], 0)
    read_q = tl.sum(before * q_row[:, None], 0)
    u = beta * (v_row - alpha * read_k)
    tl.store(state + places, alpha * before + k_row[:, None] * u[None, :], mask=mask)
    y = alpha * read_q + tl.sum(k_row * q_row, 0) * u
    tl.store(o + (sequence * heads + head) * VALUE_DIM + column, y.to(o.dtype.element_ty), mask=in_column)


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    allow_neg_eigval: bool = False,
) -> Tensor:
    """`gated_delta_rule` for one new token of every sequence, without gradients.

    Args:
        q, k: `[sequences, key_heads, Dk]`; v `[sequences, value_heads, Dv]`; a, b `[sequences, value_heads]`.
        A_log, dt_bias: `[value_heads]`.
        state: fp32 `[sequences, value_heads, Dk, Dv]`, contiguous, brought up to date in place.
        allow_neg_eigval: as in `gated_delta_rule`.

    Returns:
        o `[sequences, value_heads, Dv]` in v's dtype.
    """
    count, heads, key_dim, value_dim = state.shape
    # Rows may lie apart, as those of a fused projection do; inside a row all is dense.
    q, k, v = (x if x[0].is_contiguous() else x.contiguous() for x in (q, k, v))
    a, b = map(dense_rows, (a, b))
    A_log, dt_bias = A_log.contiguous(), dt_bias.contiguous()
    columns = min(_WIDEST, next_power_of_2(value_dim))
    while columns > _NARROWEST and count * heads * cdiv(value_dim, columns) < _PROGRAMS:
        columns //= 2
    o = torch.empty(count, heads, value_dim, dtype=v.dtype, device=v.device)
    _step[cdiv(value_dim, columns) * heads * count](
        q, k, v, a, b, A_log, dt_bias, state, o, q.stride(0), k.stride(0), v.stride(0), a.stride(0), b.stride(0),
        heads, heads // k.shape[1], key_dim**-0.5, KEY_DIM=key_dim, KEY_WIDTH=next_power_of_2(key_dim),
        VALUE_DIM=value_dim, COLUMNS=columns,
        STRONGEST=2.0 if allow_neg_eigval else 1.0, num_warps=4,
    )  # fmt: skip
    return o
