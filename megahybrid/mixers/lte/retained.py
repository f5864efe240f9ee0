"""What is retained of a document's earlier tokens at a border between context parallel ranks that keep their tokens.

With a buffer of b tokens a head, what a rank's first query finds in it are the b best of the tokens that have left the
window by then. The best of all are the best of each rank's best: every rank gives those b of a stretch of its own,
which ends a window before its tokens do, so that the next rank's goes on from there, and each merges what ranks before
it gave. What it gets stands before its window like so many tokens of the document, for each head its own: sinks first,
since they outrank all. Exits, which count what is better and leaves the window later, are the same.
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


def rows_seen(sequences: Sequences, lte: LTEConfig) -> list[tuple[int, int]]:
    """For `tokens.borrow`: a window, or all of a document's earlier tokens where window and buffer hold as many."""
    return [
        (lte.window_size if _merges(place, lte) else place.first - place.begin, 0) for place in tokens.places(sequences)
    ]


def retained(x: Tensor, rows: Rows, sequences: Sequences, lte: LTEConfig) -> tuple[Tensor, Rows | None]:
    """x, to be used in its place, and what the buffer of this rank's first document has before `rows`, its own and
    those that it has borrowed; None where these are all."""
    places, (rank, _) = tokens.places(sequences), groups.context_parallel()
    if not any(_merges(place, lte) for place in places):
        return x, None
    place = places[rank]
    best, order = _best(_merit(rows.score, place, sequences, lte), lte.buffer_size)
    given = _chosen(rows, best, order)
    x, k, v, scores = tokens.gather_beside(x, given.k, given.v, torch.stack([given.score, best.T]))
    if not _merges(place, lte):
        return x, None
    before = slice(place.begin // (place.end - place.first), rank)
    k, v, scores, merit = (part[before].flatten(0, 1) for part in (k, v, scores[:, 0], scores[:, 1]))
    best, order = _best(merit.detach().T, lte.buffer_size)
    return x, _chosen(Rows(k, v, scores), best, order)


def _merges(place: tokens.Place, lte: LTEConfig) -> bool:
    return place.first - place.begin > lte.window_size + lte.buffer_size


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
