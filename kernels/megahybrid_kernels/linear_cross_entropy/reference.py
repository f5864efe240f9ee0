"""What becomes of a chunk's logits, in PyTorch. Labels outside of `[0, vocabulary)` are another rank's."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.precision import at_least_fp32


def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row `[rows]`, at least float32: the maximum, the sum of exp(logit - maximum), the label's logit or 0."""
    wide = at_least_fp32(logits)
    peak = wide.max(-1).values
    here = (labels >= 0) & (labels < logits.shape[1])
    target = wide.gather(1, labels.where(here, 0)[:, None])[:, 0].masked_fill(~here, 0)
    return peak, (wide - peak[:, None]).exp().sum(-1), target


def gradient_(logits: Tensor, labels: Tensor, normaliser: Tensor, z_loss: float) -> None:
    """Logits become exp(logit - normaliser) (1 + 2 z_loss normaliser) - [label], in place."""
    slope = (at_least_fp32(logits) - normaliser[:, None]).exp() * (1 + 2 * z_loss * normaliser)[:, None]
    here = (labels >= 0) & (labels < logits.shape[1])
    slope.scatter_add_(1, labels.where(here, 0)[:, None], -here.to(slope.dtype)[:, None])
    logits.copy_(slope)


def statistics_and_gradient_(logits: Tensor, labels: Tensor, z_loss: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """The log of each row's normaliser and its label's logit, `[rows]`; with `gradient`, `gradient_`, too."""
    peak, total, target = statistics(logits, labels)
    normaliser = peak + torch.log(total)
    if gradient:
        gradient_(logits, labels, normaliser, z_loss)
    return normaliser, target
