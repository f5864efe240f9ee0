"""Root-mean-square norms in Triton, forward and backward, a launch each.

With r = 1 / sqrt(mean(x^2) + eps), u = r x, and s = silu(gate) or 1, over rows of `dim` values:

    y = u w s
    dx = r (g - u mean(g u)) with g = dy w s
    dgate = dy u w silu'(gate)
    dw = sum over rows of dy u s

A row is in registers as a whole, so the backward pass computes r again rather than reading it. With a residual, x is
the sum x + residual, rounded to its dtype and written, too; its own gradient is then added to dx. Rows' shares of dw
are summed within a program first, then over programs: in a fixed order, whatever the timing.
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
from megahybrid_kernels.shares import sum_shares
from megahybrid_kernels.untracked import applied

# Values of a program's tile and of a thread, forward and backward; a wider row is a tile by itself.
_FORWARD_TILE, _FORWARD_PER_THREAD = 4096, 32
_BACKWARD_TILE, _BACKWARD_PER_THREAD = 2048, 16
# Most programs of the backward pass, as many as run at once on 132 multiprocessors: 6 on each, which have 85 registers
# a thread, or 4 with a gate, which have 128. Each leaves a row of dw behind.
_PROGRAMS, _GATED_PROGRAMS = 132 * 6, 132 * 4


@triton.jit
def _load(x, row, stride, column, mask):
    return tl.load(x + row[:, None] * stride + column[None, :], mask=mask, other=0).to(tl.float32)


@kernel
def norm_kernel(
    x, other, weight, y, total, x_stride, other_stride, members, rows, eps,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """other: the gate, of which `members` rows lie side by side, or the residual. y, total: `[rows, DIM]`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < DIM)[None, :]
    places = row[:, None] * DIM + column[None, :]
    value = _load(x, row, x_stride, column, mask)
    if ADDED:
        value += _load(other, row, other_stride, column, mask)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + places, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)
    result = value * scale[:, None] * tl.load(weight + column, mask=column < DIM, other=0).to(tl.float32)[None, :]
    if GATED:
        of_gate = (row // members * other_stride + row % members * DIM)[:, None] + column[None, :]
        result *= silu(tl.load(other + of_gate, mask=mask, other=0).to(tl.float32))
    tl.store(y + places, result.to(y.dtype.element_ty), mask=mask)


@kernel
def norm_backward_kernel(
    x, other, weight, dy, dx, dother, dweight, x_stride, other_stride, dy_stride, rows, eps,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """other: the gate, or the gradient of the sum of x and the residual. dweight: `[programs, DIM]`."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.arange(0, WIDTH)
    w = tl.load(weight + column, mask=column < DIM, other=0).to(tl.float32)[None, :]
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < DIM)[None, :]
        places = row[:, None] * DIM + column[None, :]
        value = _load(x, row, x_stride, column, mask)
        grad = _load(dy, row, dy_stride, column, mask)
        scale = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)[:, None]
        unit = value * scale
        if GATED:
            gate = _load(other, row, other_stride, column, mask)
            sigmoid = tl.sigmoid(gate)
            dgate = grad * unit * w * sigmoid * (1 + gate * (1 - sigmoid))
            tl.store(dother + places, dgate.to(dother.dtype.element_ty), mask=mask)
            grad *= gate * sigmoid
        acc += grad * unit
        grad *= w
        result = scale * (grad - unit * (tl.sum(grad * unit, 1) / DIM)[:, None])
        if ADDED:
            result += _load(other, row, other_stride, column, mask)
        tl.store(dx + places, result.to(dx.dtype.element_ty), mask=mask)
    tl.store(dweight + program * DIM + column, tl.sum(acc, 0), mask=column < DIM)


def _tile(dim: int, tile: int, per_thread: int) -> dict[str, int]:
    width = next_power_of_2(dim)
    rows = max(1, tile // width)
    return {"DIM": dim, "WIDTH": width, "ROWS": rows, "num_warps": min(32, max(1, width * rows // (32 * per_thread)))}


def _rows(x: Tensor) -> Tensor:
    """`[..., dim]` as `[rows, dim]`, whose values within a row are adjacent."""
    return dense_rows(x.reshape(-1, x.shape[-1]))


class _Norm(torch.autograd.Function):
    """y of rows, and with a residual the sum before it. Saves its inputs, or the sum and weight."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float):
        other = x if gate is None and residual is None else residual if gate is None else gate
        ctx.flags = {"GATED": gate is not None, "ADDED": residual is not None}
        y = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
        total = torch.empty_like(y) if residual is not None else y
        tile = _tile(x.shape[1], _FORWARD_TILE, _FORWARD_PER_THREAD)
        norm_kernel[cdiv(len(x), tile["ROWS"])](
            x, other, weight, y, total, x.stride(0), other.stride(0), len(x) // max(1, len(other)), len(x), eps, **tile,
            **ctx.flags,
        )  # fmt: skip
        ctx.eps = eps
        ctx.save_for_backward(total if residual is not None else x, gate, weight)
        ctx.set_materialize_grads(False)
        return (y, total) if residual is not None else y

    @staticmethod
    def backward(ctx, dy: Tensor | None, dtotal: Tensor | None = None):
        x, gate, weight = ctx.saved_tensors
        if dy is None:
            return dtotal, None, dtotal, None, None
        flags = ctx.flags | {"ADDED": dtotal is not None}
        dy, dtotal = _rows(dy), None if dtotal is None else _rows(dtotal)
        other = x if gate is None and dtotal is None else dtotal if gate is None else gate
        dx = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
        dgate = None if gate is None else torch.empty(*gate.shape, dtype=gate.dtype, device=gate.device)
        tile = _tile(x.shape[1], _BACKWARD_TILE, _BACKWARD_PER_THREAD)
        programs = min(_PROGRAMS if gate is None else _GATED_PROGRAMS, cdiv(len(x), tile["ROWS"]))
        dweight = torch.empty(programs, x.shape[1], dtype=torch.float32, device=x.device)
        norm_backward_kernel[programs](
            x, other, weight, dy, dx, dx if dgate is None else dgate, dweight, x.stride(0), other.stride(0),
            dy.stride(0), len(x), ctx.eps, **tile, **flags,
        )  # fmt: skip
        return dx, dgate, dx if ctx.flags["ADDED"] else None, sum_shares(dweight, weight), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `megahybrid_kernels.norm`; float32, bfloat16 or float16."""
    return applied(_Norm, _rows(x), None, None, weight.contiguous(), eps).view_as(x)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `megahybrid_kernels.norm`; float32, bfloat16 or float16."""
    # Rows of a gate's heads lie apart where it comes from a product with others.
    apart = not torch.is_grad_enabled() and gate.dim() == 3 and gate.stride()[1:] == (gate.shape[2], 1)
    gate = gate.flatten(1) if apart else _rows(gate)
    return applied(_Norm, _rows(x), gate, None, weight.contiguous(), eps).view_as(x)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `megahybrid_kernels.norm`; float32, bfloat16 or float16."""
    y, total = applied(_Norm, _rows(x), None, _rows(residual), weight.contiguous(), eps)
    return y.view_as(x), total.view_as(x)
