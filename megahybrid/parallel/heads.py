"""Context parallelism: a rank has its own tokens with all heads, or all tokens with its own heads.

A micro-batch's row of tokens is cut into equal parts, wherever its documents begin. Norms, projections and SwiGLUs work
on a rank's own tokens. Where tokens meet, in a mixer, they stay (see `tokens`), or ranks exchange: each gets all tokens
of a part of the heads, and gives back what comes out (Jacobs et al., "DeepSpeed Ulysses", arXiv 2309.14509).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megahybrid.parallel import groups


def to_heads(*parts: Tensor) -> tuple[Tensor, ...]:
    """`[tokens of this rank, heads, …]` each → `[all tokens, heads of this rank, …]`, in one exchange. Of fewer heads
    than ranks, neighbours get the same one."""
    _, ranks = groups.context_parallel()
    if ranks == 1:
        return parts
    shares = [_repeated(part, ranks).unflatten(1, (ranks, -1)).flatten(2) for part in parts]
    whole = _Exchange.apply(torch.cat(shares, 2).transpose(0, 1)).flatten(0, 1)
    pieces = whole.split([share.shape[2] for share in shares], 1)
    # Contiguous, so that what keeps one of them does not keep all.
    return tuple(x.unflatten(1, (-1, *part.shape[2:])).contiguous() for x, part in zip(pieces, parts, strict=True))


def flat_to_heads(heads: int, *parts: Tensor) -> tuple[Tensor, ...]:
    """`to_heads` of parts `[tokens of this rank, values of all heads]`, which stay as flat."""
    if groups.context_parallel()[1] == 1:
        return parts
    return tuple(y.flatten(1) for y in to_heads(*(x.unflatten(1, (heads, -1)) for x in parts)))


def to_tokens(x: Tensor) -> Tensor:
    """`[all tokens, heads of this rank, …]` → `[tokens of this rank, heads, …]`."""
    _, ranks = groups.context_parallel()
    if ranks == 1:
        return x
    return _Exchange.apply(x.unflatten(0, (ranks, -1))).transpose(0, 1).flatten(1, 2)


def own_heads(weight: Tensor) -> Tensor:
    """Of a tensor parallel rank's part of a parameter with the heads in front, what this rank's heads have."""
    rank, ranks = groups.context_parallel()
    return weight if ranks == 1 else weight.chunk(ranks)[rank]  # a chunk, even the only one, copies its gradient


def gather_tokens(x: Tensor) -> Tensor:
    """The ranks' tokens together, without a gradient."""
    _, ranks = groups.context_parallel()
    if ranks == 1:
        return x
    whole = x.new_empty(ranks * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), parallel_state.get_context_parallel_group())
    return whole


def gather_rows(x: Tensor, places: Tensor) -> Tensor:
    """Of the ranks' tokens together those at these places, likewise."""
    rank, ranks = groups.context_parallel()
    if ranks == 1:
        return x[places]
    own = places - rank * len(x)
    rows = x[own.clamp(0, len(x) - 1)].masked_fill(((own < 0) | (own >= len(x)))[:, None], 0)
    dist.all_reduce(rows, group=parallel_state.get_context_parallel_group())
    return rows


def _repeated(part: Tensor, ranks: int) -> Tensor:
    heads = part.shape[1]
    return part if heads >= ranks else part.repeat_interleave(ranks // heads, 1)


class _Exchange(torch.autograd.Function):
    """`[ranks, …]`, of which each rank gets its entry → what each of them had for this one. It is its own transpose."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _exchanged(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _exchanged(grad)


def _exchanged(x: Tensor) -> Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=parallel_state.get_context_parallel_group())
    return received
