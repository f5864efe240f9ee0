"""Linear + cross-entropy chunk by chunk: matmuls, reductions over the vocabulary's ranks, and gradients.

For logits l of a token of weight w, over the whole vocabulary, with its normaliser n = log sum exp l:

    loss = w (n - l_label + z n^2),  dl_j = exp(l_j - n) w (1 + 2 z n) - w [j = label]

This is the gradient but for the sum's own, which is only known in the backward pass. dl, the sum of dl x^T and dl W are
made in the forward pass without it; the backward pass multiplies the latter two by it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megahybrid_kernels.backend import takes_triton
from megahybrid_kernels.linear_cross_entropy import reference
from megahybrid_kernels.products import add_product

# Of a chunk's logits. Each chunk also reads and writes weight's whole gradient once, so that few are better.
CHUNK_BYTES = 2**30
# Tokens of all chunks but the last are a multiple of this.
_TOKENS = 128


def differentiated(x: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Whether the gradients of x and weight are wanted."""
    enabled = torch.is_grad_enabled()
    return enabled and x.requires_grad, enabled and weight.requires_grad


class LinearCrossEntropy(torch.autograd.Function):
    """Saves the gradients of x and weight but for the sum's own."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor | None,
        z_loss: float,
        group,
        wanted: tuple[bool, bool],
    ):
        if takes_triton(x, weight, labels):
            from megahybrid_kernels.linear_cross_entropy import triton as backend
        else:
            backend = reference
        tokens, wide = len(x), torch.promote_types(x.dtype, torch.float32)
        labels = labels.contiguous()
        ignored = labels == reference.IGNORED
        token_weights = x.new_ones(tokens, dtype=wide) if token_weights is None else token_weights.to(wide)
        token_weights = token_weights.masked_fill(ignored, 0)
        losses, normalisers = (torch.empty(tokens, dtype=wide, device=x.device) for _ in range(2))
        dx = torch.empty(*x.shape, dtype=x.dtype, device=x.device) if wanted[0] else None
        dweight = torch.empty(*weight.shape, dtype=wide, device=x.device) if wanted[1] else None
        split = group is not None and dist.get_world_size(group) > 1
        local_labels = labels - dist.get_rank(group) * len(weight) if split else labels
        length = chunk_length(tokens, len(weight), x.element_size())
        buffer = torch.empty(min(length, tokens), len(weight), dtype=x.dtype, device=x.device)
        for begin in range(0, tokens, length):
            rows = slice(begin, min(begin + length, tokens))
            logits, own_labels, own_weights = buffer[: rows.stop - begin], local_labels[rows], token_weights[rows]
            torch.mm(x[rows], weight.T, out=logits)
            if split:
                peak, total, target = _over_ranks(*backend.statistics(logits, own_labels), group)
                normaliser = peak + total.log()
                if any(wanted):
                    backend.gradient_(logits, own_labels, own_weights, normaliser, z_loss)
            else:
                normaliser, target = backend.statistics_and_gradient_(
                    logits, own_labels, own_weights, z_loss, any(wanted)
                )
            torch.sub(normaliser, target, out=losses[rows])
            normalisers[rows] = normaliser
            if dx is not None:
                torch.mm(logits, weight, out=dx[rows])
            if dweight is not None:
                add_product(dweight, logits.T, x[rows], begin > 0)
        losses.masked_fill_(ignored, 0)
        ctx.save_for_backward(dx, dweight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(losses, normalisers)
        with_z = losses + z_loss * normalisers.square() if z_loss else losses
        return (token_weights * with_z).sum(), losses, normalisers

    @staticmethod
    def backward(ctx, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        if dx is not None:
            dx = torch.mul(dx, grad, out=torch.empty_like(dx))
        if dweight is not None:
            # Rounded as it is written: a scaled fp32 copy would be the largest tensor of all.
            dweight = torch.mul(dweight, grad, out=torch.empty_like(dweight, dtype=ctx.dtype))
        return dx, dweight, None, None, None, None, None


def chunk_length(tokens: int, vocabulary: int, item: int) -> int:
    """Tokens of a chunk, of logits of `item` bytes; all chunks are as equal as possible."""
    chunks = max(1, -(-tokens * vocabulary * item // CHUNK_BYTES))
    return max(1, -(-tokens // chunks) + _TOKENS - 1) // _TOKENS * _TOKENS


def _over_ranks(peak: Tensor, total: Tensor, target: Tensor, group) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of the whole vocabulary from those of each rank's part."""
    own_peak = peak.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    both = torch.stack([total * (own_peak - peak).exp(), target])
    dist.all_reduce(both, group=group)
    return peak, *both
