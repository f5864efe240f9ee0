"""The attachment of auxiliary losses to activations."""

from __future__ import annotations

import torch
from torch import Tensor


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        return grad, torch.full_like(loss, ctx.scale), None


def attach_loss(x: Tensor, loss: Tensor, scale: float) -> Tensor:
    """`x` unchanged; the backward pass through it also adds `scale` times the gradient of the scalar `loss`.

    A pipeline stage hands on activations, not losses: this is how auxiliary losses reach its parameters.
    """
    return _AttachLoss.apply(x, loss, scale)
