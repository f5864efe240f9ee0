"""When the capped eviction buffer lets go of each token, in closed form and O(n log n)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid_kernels.sequences import Sequences

NEVER = torch.iinfo(torch.int64).max


def _kth_smallest(values: Tensor, first: Tensor, end: Tensor, k: int) -> Tensor:
    """The k-th smallest (from 0) of `values[row, first:end]` for every query, where it exists.

    values: int64 `[rows, n]`, each row a permutation of 0..n-1; first, end: int64 `[rows, queries]`. This walks a
    wavelet matrix (Claude, Navarro & Ordóñez 2015) while building it: bit by bit, from the highest, values are parted
    stably into zeros and ones, and every query follows the part that holds its answer.
    """
    n = values.shape[1]
    columns = torch.arange(n, device=values.device)
    result = torch.zeros_like(end)
    k = torch.full_like(end, k)
    for bit in reversed(range(max(n - 1, 1).bit_length())):
        zero = (values >> bit) & 1 == 0
        zeros = F.pad(zero.cumsum(1), (1, 0))
        total, before = zeros[:, -1:], zeros[:, :-1]
        zeros_first, zeros_end = zeros.gather(1, first), zeros.gather(1, end)
        inside = zeros_end - zeros_first
        low = k < inside
        result = torch.where(low, result, result + (1 << bit))
        k = torch.where(low, k, k - inside)
        first = torch.where(low, zeros_first, total + first - zeros_first)
        end = torch.where(low, zeros_end, total + end - zeros_end)
        values = torch.empty_like(values).scatter_(1, torch.where(zero, before, total + columns - before), values)
    return result


def exits_of_candidates(
    score: Tensor,
    positions: Tensor,
    candidates: Tensor,
    window_size: int,
    sink_size: int,
    buffer_size: int,
    group: Tensor | None = None,
    group_start: Tensor | None = None,
) -> Tensor:
    """int64 `[rows, n]`: the exit of each candidate among those of its row (and group), 0 for the others.

    score, positions, candidates: `[rows, n]` with candidates in order of position; group: int64 `[n]`, ascending, and
    group_start `[n]`, the first column of each column's group, when a row holds several independent sets.
    """
    n = score.shape[1]
    rank = torch.where(positions < sink_size, torch.inf, score).masked_fill(~candidates, -torch.inf)
    order = rank.argsort(dim=1, descending=True, stable=True)
    end = torch.arange(n, device=score.device).expand_as(order)
    if group is None:
        first = torch.zeros_like(end)
    else:
        order = order.gather(1, group[order].argsort(dim=1, stable=True))
        first = group_start.expand_as(order)
    # In rank order, everything before a candidate outranks it, and columns are in order of arrival.
    last = _kth_smallest(order, first, end, buffer_size - 1).clamp(max=n - 1)
    exits = torch.where(end - first >= buffer_size, positions.gather(1, last) + window_size + 1, NEVER)
    return torch.empty_like(order).scatter_(1, order, exits).masked_fill(~candidates, 0)


def exit_positions(score: Tensor, sequences: Sequences, window_size: int, sink_size: int, buffer_size: int) -> Tensor:
    """See `megahybrid_kernels.exit_positions.exit_positions`."""
    score = score.detach().T
    positions = sequences.positions.expand_as(score)
    candidates = (score > 0) | (positions < sink_size)
    if max(sequences.lengths) <= buffer_size:
        return torch.where(candidates, NEVER, 0).T
    group_start = sequences.cu_seqlens.long()[sequences.index]
    return exits_of_candidates(
        score, positions, candidates, window_size, sink_size, buffer_size, sequences.index, group_start
    ).T
