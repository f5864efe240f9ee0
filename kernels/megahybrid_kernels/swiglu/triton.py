"""SwiGLU's product in Triton, forward and backward, a launch each; the backward pass computes silu(gate) again."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.activations import silu, silu_slope
from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.integers import cdiv
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.untracked import applied

# Values of a program: 16 for each of its 128 threads.
_BLOCK = 2048


@kernel
def swiglu_kernel(gate, up, y, gate_stride, up_stride, size, BLOCK: tl.constexpr):
    """y = silu(gate) * up, of BLOCK among the `size` values of a row."""
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    a = tl.load(gate + row * gate_stride + place, mask=mask, other=0).to(tl.float32)
    b = tl.load(up + row * up_stride + place, mask=mask, other=0).to(tl.float32)
    tl.store(y + row * size + place, (silu(a) * b).to(y.dtype.element_ty), mask=mask)


@kernel
def swiglu_backward_kernel(gate, up, dy, dgate, dup, size, BLOCK: tl.constexpr):
    """The gradients of `swiglu_kernel`'s inputs."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    a = tl.load(gate + place, mask=mask, other=0).to(tl.float32)
    b = tl.load(up + place, mask=mask, other=0).to(tl.float32)
    grad = tl.load(dy + place, mask=mask, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    slope = silu_slope(a, sigmoid)
    tl.store(dgate + place, (grad * b * slope).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + place, (grad * a * sigmoid).to(dup.dtype.element_ty), mask=mask)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = torch.empty(*up.shape, dtype=up.dtype, device=up.device)
        # Whole tensors are one row.
        dense = gate.is_contiguous() and up.is_contiguous()
        rows, size = (1, up.numel()) if dense else up.shape
        strides = (size, size) if dense else (gate.stride(0), up.stride(0))
        swiglu_kernel[rows * cdiv(size, _BLOCK)](gate, up, y, *strides, size, BLOCK=_BLOCK)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup, size = torch.empty_like(gate), torch.empty_like(up), up.numel()
        swiglu_backward_kernel[cdiv(size, _BLOCK)](gate, up, dy.contiguous(), dgate, dup, size, BLOCK=_BLOCK)
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `megahybrid_kernels.swiglu`; float32, bfloat16 or float16."""
    if up.dim() == 2 and not torch.is_grad_enabled():
        gate, up = map(dense_rows, (gate, up))  # those of one product lie apart
    else:
        gate, up = gate.contiguous(), up.contiguous()
    return applied(_SwiGLU, gate, up)
