"""A row times a matrix in Triton, a launch for it and for what makes the row.

A program has ROWS rows of the matrix, which it reads once, and makes the row that it multiplies itself: a few KB, which
all programs find in the L2 cache. A norm's scale, one number for all of its row, is found beside the products and
multiplies their sums, so that nothing waits for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.activations import silu
from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.integers import cdiv, next_power_of_2
from megahybrid_kernels.launch import kernel

# Programs in all, some 4 on each of an H100's 132 multiprocessors; values of the matrix that one multiplies at a time.
_PROGRAMS, _TILE, _WARPS = 528, 4096, 4
_MOST_ROWS = 16


@triton.jit
def _own_rows(rows, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row < rows


@kernel
def norm_kernel(
    x, residual, norm, weight, y, total, stride, rows, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    row, own = _own_rows(rows, ROWS)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in tl.static_range(0, DIM, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < DIM
        tile = tl.load(weight + row[:, None] * stride + column[None, :], mask=own[:, None] & inside[None, :], other=0)
        value = tl.load(x + column, mask=inside, other=0).to(tl.float32)
        if ADDED:
            value += tl.load(residual + column, mask=inside, other=0).to(tl.float32)
            rounded = value.to(total.dtype.element_ty)
            tl.store(total + column, rounded, mask=inside & (tl.program_id(0) == 0))
            value = rounded.to(tl.float32)
        squares += value * value
        value *= tl.load(norm + column, mask=inside, other=0).to(tl.float32)
        acc += tile.to(tl.float32) * value[None, :]
    scale = tl.rsqrt(tl.sum(squares, 0) / DIM + eps)
    tl.store(y + row, (tl.sum(acc, 1) * scale).to(y.dtype.element_ty), mask=own)


@kernel
def gated_norm_kernel(
    x, gate, norm, weight, y, stride, rows, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """EACH of the HEADS at a time, in tiles of WIDTH values each."""
    row, own = _own_rows(rows, ROWS)
    channel = tl.arange(0, WIDTH)
    w = tl.load(norm + channel, mask=channel < DIM, other=0).to(tl.float32)
    acc = tl.zeros([ROWS, EACH * WIDTH], tl.float32)
    for first in tl.static_range(0, HEADS, EACH):
        head = first + tl.arange(0, EACH)
        place = head[:, None] * DIM + channel[None, :]
        inside = (head < HEADS)[:, None] & (channel < DIM)[None, :]
        value = tl.load(x + place, mask=inside, other=0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)
        value *= scale[:, None] * w[None, :] * silu(tl.load(gate + place, mask=inside, other=0).to(tl.float32))
        flat, within = tl.reshape(place, [EACH * WIDTH]), tl.reshape(inside, [EACH * WIDTH])
        tile = tl.load(weight + row[:, None] * stride + flat[None, :], mask=own[:, None] & within[None, :], other=0)
        acc += tile.to(tl.float32) * tl.reshape(value, [EACH * WIDTH])[None, :]
    tl.store(y + row, tl.sum(acc, 1).to(y.dtype.element_ty), mask=own)


@kernel
def swiglu_kernel(
    gate, up, weight, y, stride, rows, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row, own = _own_rows(rows, ROWS)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.static_range(0, DIM, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < DIM
        tile = tl.load(weight + row[:, None] * stride + column[None, :], mask=own[:, None] & inside[None, :], other=0)
        value = silu(tl.load(gate + column, mask=inside, other=0).to(tl.float32))
        value *= tl.load(up + column, mask=inside, other=0).to(tl.float32)
        acc += tile.to(tl.float32) * value[None, :]
    tl.store(y + row, tl.sum(acc, 1).to(y.dtype.element_ty), mask=own)


def _rows(out: int) -> int:
    """Of a program: as many as leave some `_PROGRAMS` of them."""
    return min(_MOST_ROWS, next_power_of_2(max(1, round(out / _PROGRAMS / 1.5))))


def _launch(weight: Tensor) -> tuple[int, Tensor, dict[str, int]]:
    """Programs, the matrix as they read it, and constants but for the row's own."""
    rows = _rows(len(weight))
    return cdiv(len(weight), rows), dense_rows(weight), {"ROWS": rows, "num_warps": _WARPS}


def _flat(x: Tensor) -> Tensor:
    """Its values beside each other."""
    return x.reshape(-1).contiguous()


def add_rms_norm_gemv(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, weight: Tensor, total: Tensor | None
) -> Tensor:
    """See `megahybrid_kernels.gemv`."""
    (programs, weight, constants), (out, dim) = _launch(weight), weight.shape
    row, y = _flat(x), torch.empty(1, out, dtype=x.dtype, device=x.device)
    other, written = (row, y) if total is None else (_flat(residual), total)
    block = min(_TILE // constants["ROWS"], next_power_of_2(dim))
    norm_kernel[programs](
        row, other, _flat(norm), weight, y, written, weight.stride(0), out, eps,
        DIM=dim, BLOCK=block, ADDED=total is not None, **constants,
    )  # fmt: skip
    return y


def gated_rms_norm_gemv(x: Tensor, gate: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
    """See `megahybrid_kernels.gemv`."""
    (programs, weight, constants), (*_, heads, dim), out = _launch(weight), x.shape, len(weight)
    y, width = torch.empty(1, out, dtype=x.dtype, device=x.device), next_power_of_2(dim)
    each = max(1, min(_TILE // constants["ROWS"] // width, next_power_of_2(heads)))
    gated_norm_kernel[programs](
        _flat(x), _flat(gate), _flat(norm), weight, y, weight.stride(0), out, eps,
        HEADS=heads, DIM=dim, WIDTH=width, EACH=each, **constants,
    )  # fmt: skip
    return y


def swiglu_gemv(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """See `megahybrid_kernels.gemv`."""
    (programs, weight, constants), (out, dim) = _launch(weight), weight.shape
    y = torch.empty(1, out, dtype=up.dtype, device=up.device)
    block = min(_TILE // constants["ROWS"], next_power_of_2(dim))
    swiglu_kernel[programs](_flat(gate), _flat(up), weight, y, weight.stride(0), out, DIM=dim, BLOCK=block, **constants)
    return y
