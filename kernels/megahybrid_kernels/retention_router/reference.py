"""The retention router in PyTorch, over whole documents and streamed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid_kernels.counter_dropout import keep_mask
from megahybrid_kernels.precision import at_least_fp32
from megahybrid_kernels.retention_router.parameters import Dropout, RouterParameters, RouterState
from megahybrid_kernels.sequences import Sequences


def _per_head(weight: Tensor, heads: int) -> Tensor:
    """`[heads * channels_out, channels_in, kernel]` -> `[heads, channels_in, kernel * channels_out]`, at least fp32."""
    weight = at_least_fp32(weight).unflatten(0, (heads, -1))
    return weight.permute(0, 2, 3, 1).flatten(2)


def _logits(x: Tensor, parameters: RouterParameters) -> Tensor:
    """`[heads, tokens, channels]` -> `[tokens, heads]`."""
    projected = torch.bmm(x, at_least_fp32(parameters.projection)[:, :, None])[..., 0]
    return projected.T + at_least_fp32(parameters.projection_bias)


def retention_logits(
    k: Tensor,
    v: Tensor,
    parameters: RouterParameters,
    sequences: Sequences,
    dropout: Dropout | None = None,
    dilation: int = 2,
) -> Tensor:
    """See `megahybrid_kernels.retention_router.retention_logits`."""
    heads = k.shape[1]
    x = at_least_fp32(torch.cat([k, v], -1)).transpose(0, 1)
    offsets, remaining = sequences.offsets[:, None], sequences.remaining[:, None]
    for layer, (weight, bias) in enumerate(zip(parameters.weights, parameters.biases, strict=True)):
        channels, kernel_size = weight.shape[1:]
        if dropout is not None and dropout.probability > 0:
            offset = dropout.channel_offset * channels // parameters.weights[0].shape[1]
            numbers = torch.arange(offset, offset + heads * channels, device=k.device).view(heads, 1, channels)
            keep = keep_mask(dropout.keys[:, None], layer, numbers, dropout.probability)
            x = torch.where(keep, x * (1 / (1 - dropout.probability)), 0)
        # Shifting after the product moves channels_out numbers a tap instead of channels_in, which are twice as many.
        taps = torch.bmm(x, _per_head(weight, heads)).chunk(kernel_size, 2)
        y = taps[kernel_size // 2] + at_least_fp32(bias).view(heads, 1, -1)
        for tap, part in enumerate(taps):
            shift = (tap - kernel_size // 2) * dilation
            if shift:
                outside = offsets < -shift if shift < 0 else remaining < shift
                y = y + part.roll(-shift, 1).masked_fill(outside, 0)
        x = F.silu(y)
    return _logits(x, parameters)


def retention_scores(
    k: Tensor,
    v: Tensor,
    parameters: RouterParameters,
    sequences: Sequences,
    dropout: Dropout | None = None,
    dilation: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `megahybrid_kernels.retention_router.retention_scores`."""
    return retention_logits(k, v, parameters, sequences, dropout, dilation).sigmoid() - 0.5, k, v


def retention_scores_streamed(
    k: Tensor,
    v: Tensor,
    parameters: RouterParameters,
    sequences: Sequences,
    state: RouterState,
    dilation: int = 2,
) -> tuple[Tensor, RouterState]:
    """See `megahybrid_kernels.retention_router.retention_scores_streamed`.

    Each layer's past rows are put before its sequence's new ones, in one packed row.
    """
    heads, device, late = k.shape[1], k.device, 0
    x = at_least_fp32(torch.cat([k, v], -1))
    rows = []
    for weight, bias, past in zip(parameters.weights, parameters.biases, state.rows, strict=True):
        kernel_size, size = weight.shape[2], past.shape[1]
        new, borders = sequences.rows_behind(size), sequences.behind(size).cu_seqlens[:, None].long()
        slots = torch.arange(size, device=device)
        packed = x.new_zeros(len(x) + past.shape[0] * size, *x.shape[1:]).index_copy(0, new, x)
        packed = packed.index_copy(0, (borders[:-1] + slots).flatten(), past.flatten(0, 1))
        rows.append(packed[borders[1:] - size + slots])
        taps = torch.bmm(packed.transpose(0, 1), _per_head(weight, heads)).chunk(kernel_size, 2)
        y = sum(part.index_select(1, new - size + tap * dilation) for tap, part in enumerate(taps))
        late += (kernel_size - 1) // 2 * dilation
        y = F.silu(y + at_least_fp32(bias).view(heads, 1, -1))
        # Before the document's start the next layer must find zeros, as its padding would be.
        x = y.masked_fill((sequences.positions < late)[:, None], 0).transpose(0, 1)
    return _logits(x.transpose(0, 1), parameters).sigmoid() - 0.5, RouterState(tuple(rows))
