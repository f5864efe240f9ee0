"""Native sparse attention in PyTorch: blocks of queries against the keys that they can reach."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid_kernels.attention.reference import QUERY_BLOCK, attend, between, query_blocks, window_end
from megahybrid_kernels.integers import cdiv
from megahybrid_kernels.native_sparse_attention.cache import NSACache
from megahybrid_kernels.native_sparse_attention.pooling import fixed_sum, pool
from megahybrid_kernels.precision import at_least_fp32
from megahybrid_kernels.sequences import Sequences

DENSE = 4
"""Up to this many times the tokens that a query selects, one masked product with all is faster than to take them."""
TAKEN_QUERIES = 8
"""Queries that take their blocks at once: these fit a cache."""


@dataclass(frozen=True)
class _Means:
    """Where the means of all documents lie: of each a blank row, then its complete blocks.

    A blank is a key whose value is 0, which the queries see that see no block: no softmax is over nothing.

    Attributes:
        blank: bool `[means]`.
        first: int64 `[means]`, the row of a block's first token.
        places, until: int64 `[means]`; queries from row `places` to before row `until` see a mean.
    """

    block_size: int
    blank: Tensor
    first: Tensor
    places: Tensor
    until: Tensor

    @classmethod
    def of(cls, sequences: Sequences, block_size: int) -> _Means:
        total = sum(length // block_size + 1 for length in sequences.lengths)
        begins, ends = sequences.cu_seqlens[:-1].long(), sequences.cu_seqlens[1:].long()
        counts = (ends - begins) // block_size + 1
        row = torch.arange(total, device=begins.device)
        document = torch.searchsorted(counts.cumsum(0), row, right=True)
        number = row - (counts.cumsum(0) - counts)[document] - 1
        begin, end, blank = begins[document], ends[document], number < 0
        until = torch.where(blank, torch.minimum(begin + block_size - 1, end), end)
        places = begin + ((number + 1) * block_size - 1).clamp(min=0)
        return cls(block_size, blank, begin + number.clamp(min=0) * block_size, places, until)

    def __call__(self, x: Tensor) -> Tensor:
        """`[tokens, ...]` -> `[means, ...]`."""
        rows = self.first[:, None] + torch.arange(self.block_size, device=x.device)
        means = pool(x[rows.clamp(max=x.shape[0] - 1)])
        return means.masked_fill(self.blank.view(-1, *(1,) * (x.dim() - 1)), 0)


@dataclass(frozen=True)
class _Queries:
    """A block of queries and what they can reach; it has one document, or several that are short.

    Attributes:
        rows, keys: of tokens.
        means: of `_Means`.
        blocks: of all documents' blocks, incomplete ones included, as if numbered one after the other.
    """

    rows: slice
    keys: slice
    means: slice
    blocks: slice


def _queries(sequences: Sequences, size: int, block_size: int) -> Iterator[_Queries]:
    borders = sequences.borders
    means = list(accumulate((length // block_size + 1 for length in sequences.lengths), initial=0))
    blocks = list(accumulate((cdiv(length, block_size) for length in sequences.lengths), initial=0))
    for first, end, first_key in query_blocks(sequences.lengths, size):
        head, last = bisect_right(borders, first_key) - 1, bisect_right(borders, end - 1) - 1
        read = end - borders[last]
        yield _Queries(
            rows=slice(first, end),
            keys=slice(first_key, end),
            means=slice(means[head], means[last] + read // block_size + 1),
            blocks=slice(blocks[head], blocks[last] + cdiv(read, block_size)),
        )


@torch.no_grad()
def select_blocks(
    q: Tensor, k: Tensor, sequences: Sequences, block_size: int, num_blocks: int, rows: tuple[int, int]
) -> Tensor:
    """See `megahybrid_kernels.native_sparse_attention.select_blocks`."""
    means = at_least_fp32(_Means.of(sequences, block_size)(k))
    parts = []
    # Documents that share a block of queries have no more than what a query selects anyway.
    for block in _queries(sequences, min(QUERY_BLOCK, num_blocks * block_size), block_size):
        first, end = max(block.rows.start, rows[0]), min(block.rows.stop, rows[1])
        if first >= end:
            continue
        positions = sequences.offsets[first:end]
        if end - block.keys.start <= num_blocks * block_size:
            parts.append(_all_blocks(positions // block_size, k.shape[1], num_blocks))
        else:
            part = at_least_fp32(q[first - rows[0] : end - rows[0]])
            score = _score(part, means[block.means][1:], positions, block_size)
            parts.append(_choose(score, positions // block_size, num_blocks))
    return torch.cat(parts)


def _all_blocks(current: Tensor, heads: int, num_blocks: int) -> Tensor:
    block = torch.arange(num_blocks, dtype=torch.int32, device=current.device)
    return torch.where(block <= current[:, None], block, -1)[:, None].repeat(1, heads, 1)


@torch.no_grad()
def _score(q: Tensor, means: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """`[queries, kv_heads, blocks]` of one document's complete blocks; those that a query does not see have any.

    Not by a product of matrices, whose rounding depends on where a row stands: blocks with equal means have equal
    scores, and a query has the same ones in whatever part of the tokens it comes.
    """
    q, means = q.unflatten(1, (means.shape[1], -1)).permute(3, 1, 2, 0), means.permute(2, 1, 0).contiguous()
    logits = q.new_zeros(*q.shape[1:], means.shape[2])
    terms = torch.empty_like(logits)  # new ones for every channel would take most of the time
    for x, y in zip(q, means, strict=True):
        logits += torch.mul(x[..., None], y[:, None, None], out=terms)
    logits *= len(q) ** -0.5
    complete = (positions + 1) // block_size
    logits = logits.masked_fill(torch.arange(means.shape[2], device=q.device) >= complete[:, None], -torch.inf)
    return fixed_sum(torch.exp(logits - logits.logsumexp(-1, keepdim=True))).transpose(0, 1)


def _choose(score: Tensor, current: Tensor, num_blocks: int) -> Tensor:
    """int32 `[queries, kv_heads, num_blocks]` by the scores of complete blocks and each query's own block."""
    # A query's own block may be the one that is not complete.
    score = F.pad(score, (0, 1))
    block, current = torch.arange(score.shape[2], device=score.device), current[:, None, None]
    free = (block >= 1) & (block <= current - 2)
    rank = torch.where(block <= current, torch.inf, -torch.inf).to(score.dtype).where(~free, score)
    rank, best = rank.sort(dim=2, descending=True, stable=True)
    absent = score.shape[2]
    best = torch.where(rank > -torch.inf, best, absent)[..., :num_blocks].sort(dim=2).values
    best = F.pad(best, (0, num_blocks - best.shape[2]), value=absent)
    return torch.where(best < absent, best, -1).to(torch.int32)


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    sequences: Sequences,
    block_size: int,
    num_blocks: int,
    window_size: int,
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `megahybrid_kernels.native_sparse_attention.native_sparse_attention`."""
    if selection is None:
        selection = select_blocks(q, k, sequences, block_size, num_blocks, (0, sequences.tokens))
    means = _Means.of(sequences, block_size)
    branches = _Branches(selection, sequences, means, window_size)
    # As in `select_blocks`: where queries take their blocks they are one document's.
    blocks = list(_queries(sequences, min(QUERY_BLOCK, num_blocks * block_size), block_size))
    tensors = map(at_least_fp32, (q, gates, k, v, means(k), means(v)))
    return _Blocked.apply(branches, blocks, *tensors).to(q.dtype), selection


class _Branches:
    """The sum of the three branches, for one block of queries after the other."""

    def __init__(self, selection: Tensor, sequences: Sequences, means: _Means, window_size: int):
        self.selection, self.means, self.window_size = selection, means, window_size
        self.places = torch.arange(sequences.tokens, device=selection.device)
        self.window_end = window_end(sequences, window_size)
        counts = (sequences.cu_seqlens.diff().long() + means.block_size - 1) // means.block_size
        self.first_block = (counts.cumsum(0) - counts)[sequences.index]
        self.block = self.first_block + sequences.offsets // means.block_size

    def __call__(
        self, block: _Queries, q: Tensor, gates: Tensor, k: Tensor, v: Tensor, mean_k: Tensor, mean_v: Tensor
    ) -> Tensor:
        queries = self.places[block.rows]
        near = slice(max(block.keys.start, block.rows.start - self.window_size + 1), block.keys.stop)
        near_k, near_v = (x[near.start - block.keys.start :] for x in (k, v))
        seen = between(self.means.places[block.means], self.means.until[block.means], queries)[None]
        in_window = between(self.places[near], self.window_end[near], queries)[None]
        selected = self._selected(block, q, k, v)
        return _gated(gates, _attend(q, mean_k, mean_v, seen), selected, _attend(q, near_k, near_v, in_window))

    def _selected(self, block: _Queries, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        selection, block_size = self.selection[block.rows], self.means.block_size
        if _is_sparse(len(k), selection, block_size):
            positions = self.places[block.rows] - block.keys.start
            return _attend_taken(q, k, v, selection, positions, block_size)
        first = (self.first_block[block.rows] - block.blocks.start)[:, None, None]
        member = _members(selection, block.blocks.stop - block.blocks.start, first)
        visible = member[:, :, self.block[block.keys] - block.blocks.start].transpose(0, 1)
        return _attend(q, k, v, visible & (self.places[block.keys] <= self.places[block.rows, None]))


def _is_sparse(keys: int, selection: Tensor, block_size: int) -> bool:
    return keys > DENSE * selection.shape[2] * block_size


def _attend_taken(q: Tensor, k: Tensor, v: Tensor, selection: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Attention to the selected blocks of one document, up to the queries' `positions`, by queries that each take
    theirs: so many products as are selected, however long the document is."""
    heads, blocks = k.shape[1], cdiv(len(k), block_size)
    k, v = (
        F.pad(x, (0, 0, 0, 0, 0, blocks * block_size - len(x)))
        .view(blocks, block_size, heads, -1)
        .permute(2, 0, 1, 3)
        .reshape(heads * blocks, -1)
        for x in (k, v)
    )
    head, token = (torch.arange(n, device=q.device) for n in (heads, block_size))
    rows = (selection.clamp(min=0) + blocks * head[:, None]).split(TAKEN_QUERIES)
    places = selection.clamp(min=0)[..., None] * block_size + token
    visible = ((selection >= 0)[..., None] & (places <= positions[:, None, None, None])).flatten(2)
    outputs = []
    for each, row, seen in zip(q.split(TAKEN_QUERIES), rows, visible.split(TAKEN_QUERIES), strict=True):
        taken = (x.index_select(0, row.flatten()).view(len(row), heads, -1, q.shape[2]) for x in (k, v))
        outputs.append(attend(each[:, None], *taken, seen[:, :, None])[:, 0])
    return torch.cat(outputs)


def _members(selection: Tensor, blocks: int, first: Tensor | int) -> Tensor:
    """bool `[queries, kv_heads, blocks + 1]`: which blocks are selected, `first` of them before those that selection
    counts; the last means nothing."""
    member = torch.zeros(*selection.shape[:2], blocks + 1, dtype=torch.bool, device=selection.device)
    return member.scatter_(2, torch.where(selection < 0, blocks, selection.long() + first), True)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Of q `[queries, heads, head_dim]`; seen bool `[kv_heads or 1, queries, keys]`."""
    return attend(q[None], *(x.transpose(0, 1)[None] for x in (k, v)), seen[None])[0]


def _gated(gates: Tensor, *branches: Tensor) -> Tensor:
    return sum(gate[..., None] * o for gate, o in zip(gates.unbind(-1), branches, strict=True))


class _Blocked(torch.autograd.Function):
    """Block after block, each once more in the backward pass: their masks together are as large as tokens squared, and
    so are zero-filled gradients of the keys that blocks share, which autograd alone would make."""

    @staticmethod
    def forward(ctx, branches: _Branches, blocks: list[_Queries], *tensors: Tensor) -> Tensor:
        ctx.branches, ctx.blocks = branches, blocks
        ctx.save_for_backward(*tensors)
        return torch.cat([branches(block, *_pieces(block, tensors)) for block in blocks])

    @staticmethod
    def backward(ctx, grad: Tensor):
        tensors = ctx.saved_tensors
        totals = [torch.zeros_like(x) for x in tensors]
        for block in ctx.blocks:
            leaves = [x.detach().requires_grad_() for x in _pieces(block, tensors)]
            with torch.enable_grad():
                o = ctx.branches(block, *leaves)
            gradients = torch.autograd.grad(o, leaves, grad[block.rows])
            for total, gradient in zip(_pieces(block, totals), gradients, strict=True):
                total += gradient
        return None, None, *totals


def _pieces(block: _Queries, tensors) -> list[Tensor]:
    places = (block.rows, block.rows, block.keys, block.keys, block.means, block.means)
    return [x[place] for x, place in zip(tensors, places, strict=True)]


def native_sparse_attention_with_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    cache: NSACache,
    sequences: Sequences,
    block_size: int,
    num_blocks: int,
    window_size: int,
    queries: Tensor | None = None,
) -> tuple[Tensor, NSACache]:
    """See `megahybrid_kernels.native_sparse_attention.native_sparse_attention_with_cache`."""
    new = cache.append(k, v, sequences)
    queries = q if queries is None else queries
    parts = []
    for n, (start, end) in enumerate(zip(cache.lengths, new.lengths, strict=True)):
        pairs = zip(new.room.rows, new.room.spans, strict=True)
        memory = [at_least_fp32(x[n, :, : end // span].transpose(0, 1)) for x, span in pairs]
        for first in range(start, end, QUERY_BLOCK):
            places = range(first, min(first + QUERY_BLOCK, end))
            rows = slice(sequences.borders[n] + first - start, sequences.borders[n] + places.stop - start)
            each = map(at_least_fp32, (q[rows], queries[rows], gates[rows]))
            parts.append(_attend_cached(*each, memory, places, block_size, num_blocks, window_size))
    return torch.cat(parts).to(q.dtype), new


def _attend_cached(
    q: Tensor,
    queries: Tensor,
    gates: Tensor,
    memory: list[Tensor],
    places: range,
    block_size: int,
    num_blocks: int,
    window_size: int,
) -> Tensor:
    """Of queries at `places` of one sequence; `memory` has `[tokens, kv_heads, head_dim]` of keys and values, `[blocks,
    kv_heads, head_dim]` of their means."""
    k, v = (x[: places.stop] for x in memory[:2])
    mean_k, mean_v = (x[: places.stop // block_size] for x in memory[2:])
    key = torch.arange(places.stop, device=q.device)
    positions = key[places.start :]
    current, reach = positions // block_size, cdiv(places.stop, block_size)
    if reach <= num_blocks:
        selection = _all_blocks(current, k.shape[1], num_blocks)
    else:
        selection = _choose(_score(queries, mean_k, positions, block_size), current, num_blocks)
    if _is_sparse(len(k), selection, block_size):
        selected = _attend_taken(q, k, v, selection, positions, block_size)
    else:
        member = _members(selection, reach, 0)[:, :, key // block_size].transpose(0, 1)
        selected = _attend(q, k, v, member & (key <= positions[:, None]))
    near = slice(max(0, places.start - window_size + 1), places.stop)
    # A blank before the means, as `_Means` has it.
    until = torch.full((len(mean_k) + 1,), places.stop, device=q.device)
    until[0] = block_size - 1
    begins = (torch.arange(len(until), device=q.device) * block_size - 1).clamp(min=0)
    blanked = (F.pad(x, (0, 0, 0, 0, 1, 0)) for x in (mean_k, mean_v))
    compressed = _attend(q, *blanked, between(begins, until, positions)[None])
    window = _attend(q, k[near], v[near], between(key[near], key[near] + window_size, positions)[None])
    return _gated(gates, compressed, selected, window)
