"""What becomes of a chunk's logits, in PyTorch. Labels outside of `[0, vocabulary)` are another rank's."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that does not count."""


def _wide_copy(logits: Tensor) -> Tensor:
    """In at least float32, to be computed in in place: on a CPU mixed dtypes would cost a further copy."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)


def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row `[rows]`, at least float32: the maximum, the sum of exp(logit - maximum), the label's logit or 0."""
    values = _wide_copy(logits)
    peak = values.max(-1).values
    here = (labels >= 0) & (labels < logits.shape[1])
    target = values.gather(1, labels.where(here, 0)[:, None])[:, 0].masked_fill(~here, 0)
    return peak, values.sub_(peak[:, None]).exp_().sum(-1), target


def gradient_(logits: Tensor, labels: Tensor, weights: Tensor, normaliser: Tensor, z_loss: float) -> None:
    """Logits become exp(logit - normaliser) weight (1 + 2 z_loss normaliser) - weight [label], in place."""
    factor = weights * (1 + 2 * z_loss * normaliser)
    slope = _wide_copy(logits).sub_(normaliser[:, None]).exp_().mul_(factor[:, None])
    here = (labels >= 0) & (labels < logits.shape[1])
    slope.scatter_add_(1, labels.where(here, 0)[:, None], -weights.masked_fill(~here, 0)[:, None])
    logits.copy_(slope)


def statistics_and_gradient_(
    logits: Tensor, labels: Tensor, weights: Tensor, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """The log of each row's normaliser and its label's logit, `[rows]`; with `gradient`, `gradient_`, too."""
    peak, total, target = statistics(logits, labels)
    normaliser = peak + torch.log(total)
    if gradient:
        gradient_(logits, labels, weights, normaliser, z_loss)
    return normaliser, target


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """See `megahybrid_kernels.linear_cross_entropy`; with all logits at once, what the chunks are judged by."""
    logits, counted = x @ weight.T, labels != IGNORED
    normalisers = logits.logsumexp(1)
    losses = (normalisers - logits.gather(1, labels.where(counted, 0)[:, None])[:, 0]) * counted
    weights = counted if token_weights is None else token_weights * counted
    return (weights * (losses + z_loss * normalisers.square())).sum(), losses, normalisers
