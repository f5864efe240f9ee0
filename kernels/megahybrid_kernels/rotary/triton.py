"""Rotary position embedding in Triton; the backward pass is the same kernel, turning the other way.

A program computes its tokens' sines and cosines once and turns several heads by them: they cost far more than the
product does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.integers import cdiv, next_power_of_2
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.rotary.phases import RADIANS, frequencies
from megahybrid_kernels.untracked import applied

# Pairs of one head, and heads, that a program turns.
_PAIRS, _HEADS = 1024, 8


@kernel
def rotary_kernel(
    q, k, positions, frequencies, turned_q, turned_k, q_stride, q_head_stride, k_stride, k_head_stride, tokens, q_heads,
    heads, direction, radians, HALF: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Pairs of q and of k, of `heads` heads together, HALF apart, turned by their positions' angles (`direction` 1) or
    back (-1), of phases of `radians` a unit."""
    blocks = tl.cdiv(tokens, ROWS)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, first_head = tl.arange(0, WIDTH), (tl.program_id(0) // blocks).to(tl.int64) * HEADS
    mask = (row < tokens)[:, None] & (column < HALF)[None, :]
    position = tl.load(positions + row, mask=row < tokens, other=0).to(tl.int64)
    phase = position[:, None] * tl.load(frequencies + column, mask=column < HALF, other=0)[None, :]
    angle = phase.to(tl.float32) * radians
    cos, sin = tl.cos(angle), tl.sin(angle) * direction
    last_head = tl.minimum(first_head + HEADS, heads)
    for head in range(first_head, tl.minimum(last_head, q_heads)):
        _turn(q, turned_q, head, row, column, mask, cos, sin, q_stride, q_head_stride, q_heads, HALF)
    for head in range(tl.maximum(first_head, q_heads), last_head):
        _turn(k, turned_k, head - q_heads, row, column, mask, cos, sin, k_stride, k_head_stride, heads - q_heads, HALF)


@triton.jit
def _turn(x, y, head, row, column, mask, cos, sin, stride, head_stride, heads, HALF: tl.constexpr):
    source = x + head * head_stride + row[:, None] * stride + column[None, :]
    target = y + (row * heads + head)[:, None] * (2 * HALF) + column[None, :]
    first = tl.load(source, mask=mask, other=0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0).to(tl.float32)
    tl.store(target, (first * cos - second * sin).to(y.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (second * cos + first * sin).to(y.dtype.element_ty), mask=mask)


def _turned(positions: Tensor, theta: float, direction: float, *xs: Tensor) -> list[Tensor]:
    """One or two tensors, turned."""
    xs = [dense_rows(x) for x in xs]
    q, k, ys = xs[0], xs[-1], [torch.empty(*x.shape, dtype=x.dtype, device=x.device) for x in xs]
    (tokens, heads), half = q.shape[:2], q.shape[2] // 2
    every = sum(x.shape[1] for x in xs)
    width = next_power_of_2(half)
    rows = max(1, _PAIRS // width)
    rotary_kernel[cdiv(tokens, rows) * cdiv(every, _HEADS)](
        q, k, positions, frequencies(half, theta, q.device), ys[0], ys[-1], *q.stride()[:2], *k.stride()[:2], tokens,
        heads, every, direction, RADIANS, HALF=half, WIDTH=width, ROWS=rows, HEADS=_HEADS,
    )  # fmt: skip
    return ys


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, positions: Tensor, theta: float, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.theta = theta
        ctx.save_for_backward(positions)
        return tuple(_turned(positions, theta, 1.0, *xs))

    @staticmethod
    def backward(ctx, *dys: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        return None, None, *_turned(positions, ctx.theta, -1.0, *dys)


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """See `megahybrid_kernels.rotary`; float32, bfloat16 or float16."""
    return applied(_Rotary, positions.contiguous(), theta, x)[0]


def rotary_of_both(q: Tensor, k: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """See `megahybrid_kernels.rotary`."""
    return applied(_Rotary, positions.contiguous(), theta, q, k)
