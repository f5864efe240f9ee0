"""What a retention score gets from the queries that do not see its token, in PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megahybrid_kernels.precision import at_least_fp32
from megahybrid_kernels.sequences import Sequences

PAIRS = 2**22
"""Of a query and a key, a head: while documents side by side have the same length and fewer, they are done at once."""


class _Unseen(torch.autograd.Function):
    """o as it is; backward hands `sum_i p_ij <do_i, v_j - o_i>` over all i >= j that do not see j to the score.

    `p_ij = e_ij / (Z_i + e_ij)`: with j beside what it sees, a query's output would be `o_i + p_ij (v_j - o_i)`.
    """

    @staticmethod
    def forward(ctx, o: Tensor, score: Tensor, q: Tensor, k: Tensor, v: Tensor, until: Tensor, sequences: Sequences):
        ctx.save_for_backward(o, q, k, v, until)
        ctx.lengths, ctx.score_dtype = sequences.lengths, score.dtype
        return o.view_as(o)

    @staticmethod
    def backward(ctx, do: Tensor):
        o, q, k, v, until = ctx.saved_tensors
        blocks = [
            _unseen(*(x[rows] for x in (q, k, v, o, do)), until[rows] - rows.start, length)
            for rows, length in _blocks(ctx.lengths)
        ]
        return do, torch.cat(blocks).to(ctx.score_dtype), *[None] * 5


def _unseen(q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, until: Tensor, length: int) -> Tensor:
    """Of documents of one length, whose rows these are, `[rows, KV heads]`; three tensors at a time have a number in at
    least fp32 for each query head, query and key of a document."""
    kv_heads, head_dim = k.shape[1:]

    def split(x: Tensor) -> Tensor:
        """`[documents, KV heads, 1 or query heads of one, length, head_dim]`."""
        return at_least_fp32(x).unflatten(1, (kv_heads, -1)).unflatten(0, (-1, length)).permute(0, 2, 3, 1, 4)

    queries, keys, values, outputs, gradients = map(split, (q, k, v, o, do))
    place = torch.arange(length, device=k.device)
    before = place <= place[:, None]
    begins = length * torch.arange(len(queries), device=k.device)
    until = until.unflatten(0, (-1, length)).transpose(1, 2)[:, :, None, None] - begins.view(-1, 1, 1, 1, 1)
    seen = before & (place[:, None] < until)
    logits = queries @ keys.mT
    logits *= head_dim**-0.5
    total = logits.masked_fill(~seen, -torch.inf).logsumexp(-1, keepdim=True)
    p = logits.sub_(total).sigmoid_().masked_fill_(seen | ~before, 0)
    change = gradients @ values.mT
    change -= (gradients * outputs).sum(-1, keepdim=True)
    return change.mul_(p).sum((2, 3)).transpose(1, 2).flatten(0, 1)


def _blocks(lengths: Iterable[int]) -> Iterator[tuple[slice, int]]:
    """Rows of documents to be done at once, and the length that each of them has."""
    first = 0
    for length, same in itertools.groupby(lengths):
        end = first + length * sum(1 for _ in same)
        rows = length * max(1, PAIRS // length**2)
        for begin in range(first, end, rows):
            yield slice(begin, min(begin + rows, end)), length
        first = end


def with_unseen(
    o: Tensor, q: Tensor, k: Tensor, v: Tensor, score: Tensor, until: Tensor, sequences: Sequences
) -> Tensor:
    """o, the outputs of `lte_attention` with these arguments, whose backward gives the score its part of the queries
    that do not see its token; `until` is `reference.visible_until` of the score."""
    return _Unseen.apply(o, score, q.detach(), k.detach(), v.detach(), until, sequences)
