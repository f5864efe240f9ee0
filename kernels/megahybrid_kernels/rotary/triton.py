"""Rotary position embedding in Triton; the backward pass is the same kernel, turning the other way.

A program computes its tokens' sines and cosines once and turns several heads by them: they cost far more than the
product does.
"""

from __future__ import annotations

import torch
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
    x, positions, frequencies, y, stride, head_stride, tokens, heads, direction, radians,
    HALF: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """y: pairs of x, HALF apart, turned by their positions' angles (`direction` 1) or back (-1), of phases of `radians`
    a unit."""
    blocks = tl.cdiv(tokens, ROWS)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, first_head = tl.arange(0, WIDTH), (tl.program_id(0) // blocks).to(tl.int64) * HEADS
    mask = (row < tokens)[:, None] & (column < HALF)[None, :]
    position = tl.load(positions + row, mask=row < tokens, other=0).to(tl.int64)
    phase = position[:, None] * tl.load(frequencies + column, mask=column < HALF, other=0)[None, :]
    angle = phase.to(tl.float32) * radians
    cos, sin = tl.cos(angle), tl.sin(angle) * direction
    for head in range(first_head, tl.minimum(first_head + HEADS, heads)):
        source = x + head * head_stride + row[:, None] * stride + column[None, :]
        target = y + (row * heads + head)[:, None] * (2 * HALF) + column[None, :]
        first = tl.load(source, mask=mask, other=0).to(tl.float32)
        second = tl.load(source + HALF, mask=mask, other=0).to(tl.float32)
        tl.store(target, (first * cos - second * sin).to(y.dtype.element_ty), mask=mask)
        tl.store(target + HALF, (second * cos + first * sin).to(y.dtype.element_ty), mask=mask)


def _turned(x: Tensor, positions: Tensor, theta: float, direction: float) -> Tensor:
    x = dense_rows(x)
    (tokens, heads), half = x.shape[:2], x.shape[2] // 2
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = next_power_of_2(half)
    rows = max(1, _PAIRS // width)
    rotary_kernel[cdiv(tokens, rows) * cdiv(heads, _HEADS)](
        x, positions, frequencies(half, theta, x.device), y, x.stride(0), x.stride(1), tokens, heads, direction,
        RADIANS, HALF=half, WIDTH=width, ROWS=rows, HEADS=_HEADS,
    )  # fmt: skip
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, positions: Tensor, theta: float) -> Tensor:
        ctx.theta = theta
        ctx.save_for_backward(positions)
        return _turned(x, positions, theta, 1.0)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        (positions,) = ctx.saved_tensors
        return _turned(dy, positions, ctx.theta, -1.0), None, None


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """See `megahybrid_kernels.rotary`; float32, bfloat16 or float16."""
    return applied(_Rotary, x, positions.contiguous(), theta)
