"""What retention scores get once a token can only come into the buffer in another's place, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.precision import at_least_fp32
from megahybrid_kernels.sequences import Sequences


class _Displaced(torch.autograd.Function):
    """score as it is; backward takes from the gradient of those that compete what they have in common."""

    @staticmethod
    def forward(ctx, score: Tensor, competing: Tensor, sequences: Sequences, room: int) -> Tensor:
        ctx.save_for_backward(competing)
        ctx.sequences, ctx.room = sequences, room
        return score.view_as(score)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (competing,), sequences = ctx.saved_tensors, ctx.sequences

        def total(x: Tensor) -> Tensor:
            """`[sequences, heads]`, summed over each sequence's tokens."""
            return x.new_zeros(sequences.count, x.shape[1]).index_add_(0, sequences.index, x)

        exact = at_least_fp32(grad)
        rivals = total(competing.to(exact.dtype)).clamp(min=1)
        common = total(exact.masked_fill(~competing, 0)) / rivals * (1 - ctx.room / rivals).clamp(min=0)
        return (exact - common[sequences.index] * competing).to(grad.dtype), None, None, None


def with_displaced(
    score: Tensor, sequences: Sequences, window_size: int, sink_size: int, buffer_size: int | None
) -> Tensor:
    """score, of which the gate "displacing" makes the gradient of the rest's; without a buffer's limit as it is."""
    if buffer_size is None:
        return score
    left = (sequences.positions >= sink_size) & (sequences.remaining > window_size)
    return _Displaced.apply(score, (score > 0) & left[:, None], sequences, buffer_size - sink_size)
