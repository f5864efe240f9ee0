"""The output layer and its cross-entropy together, without all logits at once."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megahybrid_kernels.linear_cross_entropy.chunks import LinearCrossEntropy, differentiated
from megahybrid_kernels.linear_cross_entropy.reference import IGNORED

__all__ = ["IGNORED", "linear_cross_entropy"]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    z_loss: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over tokens of their weight times -log softmax(x weight^T)[label] + z_loss log(normaliser)^2, and parts.

    A sum, which the caller divides: by the weights of all that it averages over, which may be more than these tokens.

    The logits of a chunk of tokens are turned into their gradient in place, and this into the gradients of x and
    weight, before the next chunk's: three matmuls in all, as with all logits at once. The z-loss is that of PaLM
    (Chowdhery et al., arXiv 2204.02311, section 5). Logits are rounded to x's dtype; all else is in at least float32,
    weight's gradient until it is complete.

    Args:
        x: `[tokens, hidden]`, the same on all ranks of `group`.
        weight: `[vocabulary of this rank, hidden]` in x's dtype.
        labels: int64 `[tokens]`, ids over the whole vocabulary, or `IGNORED` (-100), which is weight 0.
        token_weights: float32 `[tokens]`, not differentiated; None for all 1.
        z_loss: weight of the squared logarithm of the softmax's normaliser.
        group: the ranks that hold a vocabulary's equal parts, in order; None when `weight` has all of it.

    Returns:
        The sum, at least float32, differentiable in x and weight once (x's gradient is of this rank's part of the
        vocabulary); and without gradients negative log-likelihoods in nats, whatever their weights but 0 where the
        label is ignored, and logarithms of normalisers, `[tokens]`, at least float32.

    Raises:
        ValueError: a shape or dtype does not fit the others.
    """
    if x.shape[-1:] != weight.shape[-1:] or x.dtype != weight.dtype or labels.shape != x.shape[:-1] or x.dim() != 2:
        raise ValueError(
            f"x {list(x.shape)} in {x.dtype}, weight {list(weight.shape)} in {weight.dtype} and labels "
            f"{list(labels.shape)} do not fit together"
        )
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(f"token_weights is {list(token_weights.shape)}, but labels are {list(labels.shape)}")
    return LinearCrossEntropy.apply(x, weight, labels, token_weights, z_loss, group, differentiated(x, weight))
