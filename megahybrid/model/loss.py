"""Losses: cross-entropy over a split vocabulary, and the attachment of auxiliary losses to activations."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megahybrid_kernels.precision import at_least_fp32


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        group = parallel_state.get_tensor_model_parallel_group()
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        wide = at_least_fp32(logits)
        peak = wide.max(-1).values
        if size > 1:
            dist.all_reduce(peak, dist.ReduceOp.MAX, group)
        shifted = wide - peak.unsqueeze(-1)
        local = labels - rank * logits.shape[-1]
        here = (local >= 0) & (local < logits.shape[-1])
        local = local.clamp(0, logits.shape[-1] - 1)
        target = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0)
        exponentials = shifted.exp_()
        total = exponentials.sum(-1)
        if size > 1:
            both = torch.stack([total, target])
            dist.all_reduce(both, group=group)
            total, target = both
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), local, here)
        ctx.dtype = logits.dtype
        logarithm = total.log()
        return logarithm - target, logarithm + peak

    @staticmethod
    def backward(ctx, grad: Tensor, grad_normaliser: Tensor) -> tuple[Tensor, None]:
        probabilities, local, here = ctx.saved_tensors
        slope = probabilities * (grad + grad_normaliser).unsqueeze(-1)
        slope.scatter_add_(-1, local.unsqueeze(-1), -(grad * here).unsqueeze(-1))
        return slope.to(ctx.dtype), None


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood a token in nats and the log of the softmax's normaliser, `[tokens]` in at least fp32.

    Args:
        logits: `[tokens, vocabulary of this tensor parallel rank]`.
        labels: int64 `[tokens]`, ids over the whole vocabulary.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels)


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
