"""A row times a matrix in Triton, a launch for it and for what makes the row.

A program has ROWS rows of the matrix, which it reads once, and makes the row that it multiplies itself: a few KB, which
all programs find in the L2 cache. A norm's scale, one number for all of its row, is found beside the products and
multiplies their sums, so that nothing waits for it.

AHEAD, a program begins while the launch before it still runs, and loads its first columns of the matrix before it waits
for that launch's end, without which it reads nothing else and writes nothing.
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
from megahybrid_kernels.targets import table_of

# Of a program: its rows of the matrix, and columns at a time. Few rows leave many programs, whose loads
# are in flight together; but each makes the whole row anew, and SwiGLU's and a gate's values cost an exponential each.
# A norm's columns are many because no load of the next ones is moved ahead of storing the sum of these.
_NORM, _GATED_NORM, _SWIGLU = (2, 2048), (4, 1024), (8, 1024)
# A thread of 4 warps has 16 bytes of each row of 1024 columns in bf16.
_WARPS = 4


@triton.jit
def _own_rows(rows, ROWS: tl.constexpr, AHEAD: tl.constexpr):
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row < rows


@triton.jit
def _tile(weight, row, column, stride, mask, FIRST: tl.constexpr, AHEAD: tl.constexpr):
    """Rows and columns of the matrix. Only after the FIRST is the launch before at its end, for what else is read."""
    tile = tl.load(weight + row[:, None] * stride + column[None, :], mask=mask, other=0)
    if AHEAD and FIRST:
        tl.extra.cuda.gdc_wait()
    return tile.to(tl.float32)


@kernel
def norm_kernel(
    x, residual, norm, weight, y, total, stride, rows, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADDED: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """y = weight · norm of x, or ADDED of x + residual, which goes to total; BLOCK of DIM columns at a time."""
    row, own = _own_rows(rows, ROWS, AHEAD)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in tl.static_range(0, DIM, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < DIM
        tile = _tile(weight, row, column, stride, own[:, None] & inside[None, :], first == 0, AHEAD)
        value = tl.load(x + column, mask=inside, other=0).to(tl.float32)
        if ADDED:
            value += tl.load(residual + column, mask=inside, other=0).to(tl.float32)
            rounded = value.to(total.dtype.element_ty)
            tl.store(total + column, rounded, mask=inside & (tl.program_id(0) == 0))
            value = rounded.to(tl.float32)
        squares += value * value
        value *= tl.load(norm + column, mask=inside, other=0).to(tl.float32)
        acc += tile * value[None, :]
    scale = tl.rsqrt(tl.sum(squares, 0) / DIM + eps)
    tl.store(y + row, (tl.sum(acc, 1) * scale).to(y.dtype.element_ty), mask=own)


@kernel
def gated_norm_kernel(
    x, gate, norm, weight, y, stride, rows, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """EACH of the HEADS at a time, in tiles of WIDTH values each.

    The matrix's columns are counted anew: reshaped, Triton does not see that they are beside each other, and loads each
    by itself.
    """
    row, own = _own_rows(rows, ROWS, AHEAD)
    channel = tl.arange(0, WIDTH)
    flat = tl.arange(0, EACH * WIDTH)
    acc = tl.zeros([ROWS, EACH * WIDTH], tl.float32)
    for first in tl.static_range(0, HEADS, EACH):
        column = (first + flat // WIDTH) * DIM + flat % WIDTH
        within = (first + flat // WIDTH < HEADS) & (flat % WIDTH < DIM)
        tile = _tile(weight, row, column, stride, own[:, None] & within[None, :], first == 0, AHEAD)
        head = first + tl.arange(0, EACH)
        place = head[:, None] * DIM + channel[None, :]
        inside = (head < HEADS)[:, None] & (channel < DIM)[None, :]
        value = tl.load(x + place, mask=inside, other=0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)
        w = tl.load(norm + channel, mask=channel < DIM, other=0).to(tl.float32)
        value *= scale[:, None] * w[None, :] * silu(tl.load(gate + place, mask=inside, other=0).to(tl.float32))
        acc += tile * tl.reshape(value, [EACH * WIDTH])[None, :]
    tl.store(y + row, tl.sum(acc, 1).to(y.dtype.element_ty), mask=own)


@kernel
def swiglu_kernel(
    gate, up, weight, y, stride, rows,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y = weight · (silu(gate) * up), BLOCK of DIM columns at a time."""
    row, own = _own_rows(rows, ROWS, AHEAD)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.static_range(0, DIM, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < DIM
        tile = _tile(weight, row, column, stride, own[:, None] & inside[None, :], first == 0, AHEAD)
        value = silu(tl.load(gate + column, mask=inside, other=0).to(tl.float32))
        value *= tl.load(up + column, mask=inside, other=0).to(tl.float32)
        acc += tile * value[None, :]
    tl.store(y + row, tl.sum(acc, 1).to(y.dtype.element_ty), mask=own)


def _launch(weight: Tensor, ahead: bool) -> tuple[Tensor, dict[str, bool | int]]:
    """The matrix as kernels read it, and how they are launched."""
    rows = dense_rows(weight)
    ahead = ahead and rows is weight and weight.is_cuda and table_of(weight.device).overlaps
    return rows, {"AHEAD": ahead, "num_warps": _WARPS} | ({"launch_pdl": True} if ahead else {})


def _flat(x: Tensor) -> Tensor:
    """Its values beside each other."""
    return x.reshape(-1).contiguous()


def add_rms_norm_gemv(
    x: Tensor,
    residual: Tensor | None,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    total: Tensor | None,
    ahead: bool = False,
) -> Tensor:
    """See `megahybrid_kernels.gemv`."""
    (out, dim), (rows, columns), (weight, options) = weight.shape, _NORM, _launch(weight, ahead)
    row, y = _flat(x), torch.empty(1, out, dtype=x.dtype, device=x.device)
    other, written = (row, y) if total is None else (_flat(residual), total)
    norm_kernel[cdiv(out, rows)](
        row, other, _flat(norm), weight, y, written, weight.stride(0), out, eps,
        DIM=dim, BLOCK=min(columns, next_power_of_2(dim)), ROWS=rows, ADDED=total is not None, **options,
    )  # fmt: skip
    return y


def gated_rms_norm_gemv(
    x: Tensor, gate: Tensor, norm: Tensor, eps: float, weight: Tensor, ahead: bool = False
) -> Tensor:
    """See `megahybrid_kernels.gemv`."""
    (*_, heads, dim), out, (rows, columns) = x.shape, len(weight), _GATED_NORM
    weight, options = _launch(weight, ahead)
    y, width = torch.empty(1, out, dtype=x.dtype, device=x.device), next_power_of_2(dim)
    each = max(1, min(columns // width, next_power_of_2(heads)))
    gated_norm_kernel[cdiv(out, rows)](
        _flat(x), _flat(gate), _flat(norm), weight, y, weight.stride(0), out, eps,
        HEADS=heads, DIM=dim, WIDTH=width, EACH=each, ROWS=rows, **options,
    )  # fmt: skip
    return y


def swiglu_gemv(gate: Tensor, up: Tensor, weight: Tensor, ahead: bool = False) -> Tensor:
    """See `megahybrid_kernels.gemv`."""
    (out, dim), (rows, columns), (weight, options) = weight.shape, _SWIGLU, _launch(weight, ahead)
    y = torch.empty(1, out, dtype=up.dtype, device=up.device)
    swiglu_kernel[cdiv(out, rows)](
        _flat(gate), _flat(up), weight, y, weight.stride(0), out,
        DIM=dim, BLOCK=min(columns, next_power_of_2(dim)), ROWS=rows, **options,
    )  # fmt: skip
    return y
