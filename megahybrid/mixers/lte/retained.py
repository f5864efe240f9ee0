"""What is retained of a document's earlier tokens at a border between context parallel ranks that keep their tokens.

With a buffer of b tokens a head, what a rank's first query finds in it are the b best of the tokens that have left the
window by then. The best of all are the best of each rank's best: every rank gives those b of a stretch of its own,
which ends a window before its tokens do, so that the next rank's goes on from there, and each merges what ranks before
it gave. What it gets stands before its window like so many tokens of the document, for each head its own: sinks first,
since they outrank all. Exits, which count what is better and leaves the window later, are the same.

Without a buffer's limit a query finds every sink and positive score. Then ranks give the best of their stretches
likewise, as many as they have room for, and each has all that ranks before it gave. Those for which there was no room
are counted: a step that misses any is void.

Gradients of what was given are summed at its owner. A score's, <dv, v>, is made by each rank that has a copy of v, from
its own part of dv: their sum is that of the sum.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid.mixers.lte import LTEConfig
from megahybrid.parallel import groups, tokens
from megahybrid_kernels import Sequences


class Rows(NamedTuple):
    """Keys and values `[rows, heads, head_dim]`, scores `[rows, heads]`."""

    k: Tensor
    v: Tensor
    score: Tensor


class Retained(NamedTuple):
    """What `retained` gives.

    Attributes:
        rows: those that it was given, to be used in their place; what stands in `before`, too, has a score there that
            retains nothing.
        before: what is retained of this rank's first document before the rows that it has; None where these are all.
        missing: int64 `[heads]`, tokens of this rank that others should retain, but for which it had no room.
    """

    rows: Rows
    before: Rows | None
    missing: Tensor


def rows_seen(sequences: Sequences, lte: LTEConfig, room: int | None) -> list[tuple[int, int]]:
    """For `tokens.borrow`: before a rank's own a window, or all of a document's earlier tokens where it and the room of
    one rank hold as many, or where there is None; and those from which the scores of all of these follow."""
    found = []
    for place in tokens.places(sequences):
        wanted = lte.window_size + lte.margin if _merges(place, lte, room) else sequences.tokens
        found.append((min(wanted, place.first - place.begin), min(lte.margin, place.stop - place.end)))
    return found


def retained(rows: Rows, before: int, sequences: Sequences, lte: LTEConfig, room: int | None, capped: bool) -> Retained:
    """What ranks give each other of what they retain.

    Args:
        rows: this rank's own, and those that `rows_seen` says around them, `before` of them before its own.
        room: of a head, how many each rank gives; the buffer's size where the buffer is `capped`, and None for no
            limit, where ranks have borrowed all rows.
    """
    places, (rank, _) = tokens.places(sequences), groups.context_parallel()
    missing = torch.zeros(rows.score.shape[1], dtype=torch.int64, device=rows.score.device)
    if room is None or not any(_merges(place, lte, room) for place in places):
        return Retained(rows, None, missing)
    place = places[rank]
    number = torch.arange(len(rows.score), device=missing.device) + (place.first - before)
    merit = _merit(rows.score, number, place, sequences, lte)
    if not capped and any(_merges(each, lte, room) and each.begin < place.end for each in places[rank + 1 :]):
        missing = ((merit > 0).sum(1) - room).clamp(min=0)
    best, order = _best(merit, room)
    rows, given = _chosen(rows, best, order)
    k, keys, scores = tokens.gather_beside(rows.k, torch.stack([given.k, given.v]), torch.stack([given.score, best.T]))
    rows = rows._replace(k=k)
    if not _merges(place, lte, room):
        return Retained(rows, None, missing)
    given_before = slice(place.begin // (place.end - place.first), rank)
    k, v, score, merit = (part[given_before, each].flatten(0, 1) for part in (keys, scores) for each in (0, 1))
    best, order = _best(merit.detach().T, room if capped else len(merit))
    _, more = _chosen(Rows(k, v, score), best, order)
    old = (number < place.first - lte.window_size)[:, None]
    return Retained(rows._replace(score=rows.score.masked_fill(old, -1)), more, missing)


def _merges(place: tokens.Place, lte: LTEConfig, room: int | None) -> bool:
    return room is not None and place.first - place.begin > lte.window_size + room


def _merit(score: Tensor, row: Tensor, place: tokens.Place, sequences: Sequences, lte: LTEConfig) -> Tensor:
    """`[heads, rows]`, by which the last document's rows of this rank's stretch are ranked, of those numbered `row`:
    infinity for sinks, -infinity for what is not retained."""
    begin = sequences.borders[bisect_right(sequences.borders, place.end - 1) - 1]
    stretch = (row >= max(begin, place.first - lte.window_size)) & (row < place.end - lte.window_size)
    merit = score.detach().T.masked_fill(row < begin + lte.sink_size, torch.inf)
    return merit.masked_fill(~stretch | (merit <= 0), -torch.inf)


def _best(merit: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` best of each head, of like ones the earlier, and where they stand; -infinity for none."""
    best, order = F.pad(merit, (0, max(0, size - merit.shape[1])), value=-torch.inf).sort(descending=True, stable=True)
    return best[:, :size], order[:, :size].clamp(max=merit.shape[1] - 1)


def _chosen(rows: Rows, best: Tensor, order: Tensor) -> tuple[Rows, Rows]:
    """The rows, to use in their place, and of each head those in order, blanks with a score that retains nothing."""
    heads, size = order.shape
    places = (order.T * heads + torch.arange(heads, device=order.device)).flatten()
    rows, (k, v, score) = zip(*(_Chosen.apply(part, places) for part in rows), strict=True)
    chosen = Rows(*(part.unflatten(0, (size, heads)) for part in (k, v, score)))
    return Rows(*rows), chosen._replace(score=chosen.score.masked_fill(best.T <= 0, -1))


class _Chosen(torch.autograd.Function):
    """`[rows, heads, …]` as it is, and of the rows of all heads, one after the other, those at these places.

    It keeps neither for the backward pass, where one copy takes both gradients.
    """

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(places)
        return x.view_as(x), x.flatten(0, 1).index_select(0, places)

    @staticmethod
    def backward(ctx, grad: Tensor, chosen: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        whole = grad.clone(memory_format=torch.contiguous_format)
        return whole.view(-1, *chosen.shape[1:]).index_add_(0, places, chosen).view_as(whole), None
