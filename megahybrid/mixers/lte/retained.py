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
        x: as it was, to be used in its place.
        rows: what is retained of this rank's first document before the rows that it has; None where these are all.
        missing: int64 `[heads]`, tokens of this rank that others should retain, but for which it had no room.
    """

    x: Tensor
    rows: Rows | None
    missing: Tensor


def rows_seen(sequences: Sequences, lte: LTEConfig, room: int | None) -> list[tuple[int, int]]:
    """For `tokens.borrow`: a window, or all of a document's earlier tokens where it and the room of one rank hold as
    many, or where there is None."""
    return [
        (lte.window_size if _merges(place, lte, room) else place.first - place.begin, 0)
        for place in tokens.places(sequences)
    ]


def retained(x: Tensor, rows: Rows, sequences: Sequences, lte: LTEConfig, room: int | None, capped: bool) -> Retained:
    """What ranks give each other of what they retain.

    Args:
        x: something that every rank goes on with.
        rows: this rank's own, and those that `rows_seen` says before them.
        room: of a head, how many each rank gives; the buffer's size where the buffer is `capped`, and None for no
            limit, where ranks have borrowed all rows.
    """
    places, (rank, _) = tokens.places(sequences), groups.context_parallel()
    missing = torch.zeros(rows.score.shape[1], dtype=torch.int64, device=x.device)
    if room is None or not any(_merges(place, lte, room) for place in places):
        return Retained(x, None, missing)
    place = places[rank]
    merit = _merit(rows.score, place, sequences, lte)
    if not capped and any(_merges(each, lte, room) and each.begin < place.end for each in places[rank + 1 :]):
        missing = ((merit > 0).sum(1) - room).clamp(min=0)
    best, order = _best(merit, room)
    given = _chosen(rows, best, order)
    x, k, v, scores = tokens.gather_beside(x, given.k, given.v, torch.stack([given.score, best.T]))
    if not _merges(place, lte, room):
        return Retained(x, None, missing)
    before = slice(place.begin // (place.end - place.first), rank)
    k, v, scores, merit = (part[before].flatten(0, 1) for part in (k, v, scores[:, 0], scores[:, 1]))
    best, order = _best(merit.detach().T, room if capped else len(merit))
    return Retained(x, _chosen(Rows(k, v, scores), best, order), missing)


def _merges(place: tokens.Place, lte: LTEConfig, room: int | None) -> bool:
    return room is not None and place.first - place.begin > lte.window_size + room


def _merit(score: Tensor, place: tokens.Place, sequences: Sequences, lte: LTEConfig) -> Tensor:
    """`[heads, rows]`, by which the last document's rows of this rank's stretch are ranked: infinity for sinks,
    -infinity for what is not retained."""
    begin = sequences.borders[bisect_right(sequences.borders, place.end - 1) - 1]
    row = torch.arange(place.end - len(score), place.end, device=score.device)
    stretch = (row >= max(begin, place.first - lte.window_size)) & (row < place.end - lte.window_size)
    merit = score.detach().T.masked_fill(row < begin + lte.sink_size, torch.inf)
    return merit.masked_fill(~stretch | (merit <= 0), -torch.inf)


def _best(merit: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` best of each head, of like ones the earlier, and where they stand; -infinity for none."""
    best, order = F.pad(merit, (0, max(0, size - merit.shape[1])), value=-torch.inf).sort(descending=True, stable=True)
    return best[:, :size], order[:, :size].clamp(max=merit.shape[1] - 1)


def _chosen(rows: Rows, best: Tensor, order: Tensor) -> Rows:
    """Of each head those in order, blanks with a score that retains nothing."""
    heads, size = order.shape
    places = (order.T * heads + torch.arange(heads, device=order.device)).flatten()
    # Unlike `gather`, it keeps no rows for the backward pass.
    k, v, score = (part.flatten(0, 1).index_select(0, places).unflatten(0, (size, heads)) for part in rows)
    return Rows(k, v, score.masked_fill(best.T <= 0, -1))
