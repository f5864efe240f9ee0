"""What a retention score gets from the queries that do not see its token, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.lte_attention.reference import visible_until
from megahybrid_kernels.precision import at_least_fp32
from megahybrid_kernels.sequences import Sequences


class _Unseen(torch.autograd.Function):
    """o as it is; backward hands `sum_i p_ij <do_i, v_j - o_i>` over all i >= j that do not see j to the score.

    `p_ij = e_ij / (Z_i + e_ij)`: with j beside what it sees, a query's output would be `o_i + p_ij (v_j - o_i)`.
    """

    @staticmethod
    def forward(ctx, o: Tensor, score: Tensor, q: Tensor, k: Tensor, v: Tensor, until: Tensor, sequences: Sequences):
        ctx.save_for_backward(o, q, k, v, until)
        ctx.sequences, ctx.score_dtype = sequences, score.dtype
        return o.view_as(o)

    @staticmethod
    def backward(ctx, do: Tensor):
        o, q, k, v, until = ctx.saved_tensors
        tokens, kv_heads, head_dim = k.shape
        row = _row(ctx.sequences.lengths)

        def split(x: Tensor) -> Tensor:
            """`[rows, KV heads, 1 or query heads of one, tokens of a row, head_dim]`."""
            x = at_least_fp32(x).reshape(tokens // row, row, kv_heads, -1, head_dim)
            return x.permute(0, 2, 3, 1, 4)

        queries, keys, values, outputs, gradients = map(split, (q, k, v, o, do))
        place = torch.arange(tokens, device=k.device).view(-1, 1, 1, row)
        document = ctx.sequences.index.view(-1, 1, 1, row)
        before = (place[..., None, :] <= place[..., None]) & (document[..., None, :] == document[..., None])
        seen = before & (place[..., None] < until.view(-1, row, kv_heads).transpose(1, 2)[:, :, None, None])
        logits = queries @ keys.mT * head_dim**-0.5
        total = logits.masked_fill(~seen, -torch.inf).logsumexp(-1, keepdim=True)
        p = (logits - total).sigmoid().masked_fill(seen | ~before, 0)
        change = gradients @ values.mT - (gradients * outputs).sum(-1, keepdim=True)
        unseen = (p * change).sum((2, 3))
        return do, unseen.transpose(1, 2).reshape(tokens, kv_heads).to(ctx.score_dtype), *[None] * 5


def _row(lengths: tuple[int, ...]) -> int:
    """Tokens of the rows, all of one size, into which documents can be laid without cutting any: the longest one's if
    that will do, else all."""
    longest, end, borders = max(lengths), 0, {0}
    for length in lengths:
        end += length
        borders.add(end)
    return longest if all(place in borders for place in range(0, end, longest)) and end % longest == 0 else end


def with_unseen(
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    sequences: Sequences,
    window_size: int,
    sink_size: int,
    buffer_size: int | None,
) -> Tensor:
    """o, the outputs of `lte_attention` with these arguments, whose backward gives the score its part of the queries
    that do not see its token."""
    until = visible_until(score.detach(), sequences, window_size, sink_size, buffer_size)
    return _Unseen.apply(o, score, q.detach(), k.detach(), v.detach(), until, sequences)
