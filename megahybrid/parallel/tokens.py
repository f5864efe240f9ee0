"""Context parallelism where a rank keeps its tokens, with all heads: what passes over the borders between ranks.

A micro-batch's row of tokens is cut into equal parts, wherever its documents begin; `heads` exchanges it for heads
instead. Every rank knows all documents' lengths, so that none has to ask how much another wants. What others borrow is
passed on by functions that also give back, as it is and to be used in its place, something that every rank goes on
with: so in the backward pass all take part, whether they borrowed or not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megahybrid.parallel import groups
from megahybrid_kernels import Sequences
from megahybrid_kernels.gated_delta_rule import Border


class Place(NamedTuple):
    """Where a rank's tokens are: rows from `first` to before `end`; `begin` is the first row of the sequence of its
    first token, `stop` the row after the last of that of its last token."""

    first: int
    end: int
    begin: int
    stop: int


class Borrowed(NamedTuple):
    """A rank's own rows, and those before and after them that it borrows."""

    own: Tensor
    before: Tensor
    after: Tensor

    def joined(self) -> Tensor:
        """All, one after the other."""
        return torch.cat([self.before, self.own, self.after])


def places(sequences: Sequences) -> list[Place]:
    """Of all ranks."""
    _, ranks = groups.context_parallel()
    tokens, borders, found = sequences.tokens // ranks, sequences.borders, []
    for first in range(0, sequences.tokens, tokens):
        one, last = (bisect_right(borders, row) for row in (first, first + tokens - 1))
        found.append(Place(first, first + tokens, borders[one - 1], borders[last]))
    return found


def own(sequences: Sequences, before: int = 0, after: int = 0) -> Sequences:
    """What this rank's tokens, and so many before and after them, have of the sequences."""
    place = places(sequences)[groups.context_parallel()[0]]
    return sequences.part(place.first - before, place.end + after)


def border(sequences: Sequences) -> Border | None:
    """How the delta rule's states pass from rank to rank; None where all sequences begin at a border."""
    rank, every = groups.context_parallel()[0], places(sequences)
    if all(place.begin == place.first for place in every):
        return None
    place = every[rank]
    tokens = place.end - place.first
    return Border(rank, place.begin // tokens, (place.stop - 1) // tokens, gather)


def gather(x: Tensor) -> Tensor:
    """`[ranks, …]`: what every rank has, without a gradient."""
    whole = x.new_empty(groups.context_parallel()[1], *x.shape)
    dist.all_gather_into_tensor(whole.flatten(0, 1), x.contiguous(), parallel_state.get_context_parallel_group())
    return whole


def gather_beside(x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """x as it is, and of each part `[ranks, …]`: what every rank has."""
    return _Gathered.apply(x, *parts)


def borrow(rows: Sequence[tuple[int, int]], *parts: Tensor) -> tuple[Borrowed, ...]:
    """Of each part `[tokens of this rank, …]` with the rows around it that this rank wants; parts have one dtype.

    rows: how many every rank wants, before and after its own.
    """
    if not any(map(any, rows)):
        return tuple(Borrowed(part, part[:0], part[:0]) for part in parts)
    outputs = _Borrowed.apply(_given(rows, len(parts[0])), rows[groups.context_parallel()[0]], *parts)
    return tuple(Borrowed(*outputs[number :: len(parts)]) for number in range(len(parts)))


def rows_around(sequences: Sequences, before: int, after: int = 0) -> list[tuple[int, int]]:
    """For `borrow`: up to so many, of the sequences of a rank's first and last token."""
    return [(min(before, place.first - place.begin), min(after, place.stop - place.end)) for place in places(sequences)]


def _given(rows: Sequence[tuple[int, int]], tokens: int) -> list[list[slice]]:
    """By giver, which of its rows every taker gets."""

    def shared(giver: int, taker: int) -> slice:
        before, after = rows[taker]
        first, end = (taker - giver) * tokens - before, (taker - giver + 1) * tokens + after
        first = min(max(first, 0), tokens)
        return slice(first, max(first, min(end, tokens))) if giver != taker else slice(0, 0)

    return [[shared(giver, taker) for taker in range(len(rows))] for giver in range(len(rows))]


class _Borrowed(torch.autograd.Function):
    """All parts as they are, the rows before each, and those after."""

    @staticmethod
    def forward(ctx, given: list[list[slice]], wanted: tuple[int, int], *parts: Tensor) -> tuple[Tensor, ...]:
        rank, _ = groups.context_parallel()
        ctx.given, ctx.taken = given[rank], [_length(each[rank]) for each in given]
        ctx.widths = [part[0].numel() for part in parts]
        sent = torch.cat([torch.cat([part[rows] for rows in ctx.given]).flatten(1) for part in parts], 1)
        found = _exchanged(sent, list(map(_length, ctx.given)), ctx.taken).split(wanted)
        pieces = [piece.split(ctx.widths, 1) for piece in found]
        shaped = [
            x.unflatten(1, part.shape[1:]).contiguous()
            for piece in pieces
            for x, part in zip(piece, parts, strict=True)
        ]
        return *(part.view_as(part) for part in parts), *shaped

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.widths)
        borrowed = [torch.cat([x.flatten(1) for x in grads[first : first + count]], 1) for first in (count, 2 * count)]
        returned = _exchanged(torch.cat(borrowed), ctx.taken, list(map(_length, ctx.given)))
        if not len(returned):
            return None, None, *grads[:count]
        sums = []
        for grad, back in zip(grads[:count], returned.split(ctx.widths, 1), strict=True):
            grad = grad.clone()
            for rows, each in zip(ctx.given, back.split(list(map(_length, ctx.given))), strict=True):
                grad[rows] += each.unflatten(1, grad.shape[1:])
            sums.append(grad)
        return None, None, *sums


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        return x.view_as(x), *map(gather, parts)

    @staticmethod
    def backward(ctx, grad: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return grad, *(_exchanged(each).sum(0) for each in grads)


def _length(rows: slice) -> int:
    return rows.stop - rows.start


def _exchanged(x: Tensor, given: list[int] | None = None, taken: list[int] | None = None) -> Tensor:
    received = x.new_empty(len(x) if taken is None else sum(taken), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), taken, given, group=parallel_state.get_context_parallel_group())
    return received
