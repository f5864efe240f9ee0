"""The short causal convolution in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid_kernels.precision import at_least_fp32
from megahybrid_kernels.sequences import Sequences


def _correlate(x: Tensor, weight: Tensor) -> Tensor:
    """sum_i weight[:, i] x[t + i]: `[rows, channels]` and `[channels, width]` to `[rows - width + 1, channels]`."""
    # A channels-last image of height 1, for which CPUs have a fast depthwise convolution.
    image, filters = x[None, None].permute(0, 3, 1, 2), weight[:, None, None, :]
    return F.conv2d(image, filters.contiguous(memory_format=torch.channels_last), groups=len(weight))[0, :, 0].T


class _Correlate(torch.autograd.Function):
    """`_correlate` with a backward of its own: torch's depthwise one is several times slower than its parts."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _correlate(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, width = len(grad), weight.shape[1]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _correlate(F.pad(grad, (0, 0, width - 1, width - 1)), weight.flip(1))
        if ctx.needs_input_grad[1]:
            grad_weight = torch.stack([(grad * x[i : i + rows]).sum(0) for i in range(width)], 1)
        return grad_x, grad_weight


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    sequences: Sequences,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `megahybrid_kernels.causal_conv1d`.

    Every sequence's state is put before its tokens, so that one correlation over all rows sees no border, and the new
    state is each sequence's last rows, however short the sequence is.
    """
    history = weight.shape[1] - 1
    rows = torch.arange(sequences.tokens, device=x.device) + history * (sequences.index + 1)
    before_end = torch.arange(history, device=x.device) - history
    ends = sequences.cu_seqlens[1:].long() + history * torch.arange(1, sequences.count + 1, device=x.device)
    starts = ends - sequences.cu_seqlens.diff()
    padded = x.new_zeros(sequences.tokens + history * sequences.count, x.shape[1]).index_copy(0, rows, x)
    if initial_state is not None:
        first = (starts[:, None] + before_end).flatten()
        padded = padded.index_copy(0, first, initial_state.flatten(0, 1).to(x.dtype))
    y = F.silu(_Correlate.apply(at_least_fp32(padded), weight.to(at_least_fp32(x).dtype)))
    y = y.index_select(0, rows - history).to(x.dtype)
    if not output_final_state:
        return y, None
    last = (ends[:, None] + before_end).flatten()
    return y, padded.index_select(0, last).unflatten(0, (sequences.count, history))
