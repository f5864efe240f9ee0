"""One step of the short causal convolution: one new token of every sequence, its rows of state moved on in place."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.activations import silu
from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.integers import cdiv
from megahybrid_kernels.launch import kernel

_CHANNELS = 256


@kernel
def _step(x, weight, state, y, x_stride, channels, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Some channels of a sequence; a thread keeps to its own ones, so that what it overwrites it has read."""
    blocks = tl.cdiv(channels, CHANNELS)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    mask = channel < channels
    rows = state + sequence * (WIDTH - 1) * channels + channel
    newest = tl.load(x + sequence * x_stride + channel, mask=mask, other=0)
    acc = newest.to(tl.float32) * tl.load(weight + channel * WIDTH + WIDTH - 1, mask=mask, other=0).to(tl.float32)
    for tap in tl.static_range(WIDTH - 1):
        past = tl.load(rows + tap * channels, mask=mask, other=0)
        acc += past.to(tl.float32) * tl.load(weight + channel * WIDTH + tap, mask=mask, other=0).to(tl.float32)
        if tap > 0:
            tl.store(rows + (tap - 1) * channels, past, mask=mask)
    if WIDTH > 1:
        tl.store(rows + (WIDTH - 2) * channels, newest.to(state.dtype.element_ty), mask=mask)
    tl.store(y + sequence * channels + channel, silu(acc).to(y.dtype.element_ty), mask=mask)


def causal_conv1d_step(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """`causal_conv1d` for one new token of every sequence, without gradients.

    Args:
        x: `[sequences, channels]`.
        weight: `[channels, width]`.
        state: `[sequences, width - 1, channels]`, contiguous, the latest inputs, brought up to date in place.

    Returns:
        y `[sequences, channels]` in x's dtype.
    """
    x, weight = dense_rows(x), weight.contiguous()
    count, channels = x.shape
    y = torch.empty(count, channels, dtype=x.dtype, device=x.device)
    _step[cdiv(channels, _CHANNELS) * count](
        x, weight, state, y, x.stride(0), channels, WIDTH=weight.shape[1], CHANNELS=_CHANNELS, num_warps=2
    )
    return y
