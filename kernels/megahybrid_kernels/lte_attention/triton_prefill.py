"""Attention under learnable token eviction of many new tokens to a cache and each other, by the kernels of training.

What a sequence's cache holds is put before its new tokens, as rows of one packed row:

    buffer, by position | window, by position | new tokens

Window and new tokens lie without a gap, so that distances between them are those of their positions; what the buffer
holds lies further back than a window reaches from any new token, which is all that counts of its place: it has arrived,
and the candidates that push it out arrive where they would. So `lte_attention` of this row shows the new tokens exactly
what they should see; the outputs of the rows before them mean nothing. Sequences that begin here have no such rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.attention.reference import gather_slots
from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.exit_positions.triton import exit_positions
from megahybrid_kernels.integers import cdiv
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.lte_attention.cache import LTECache
from megahybrid_kernels.lte_attention.triton import _forward, _Shape
from megahybrid_kernels.lte_attention.triton_cache import cache_after
from megahybrid_kernels.lte_attention.triton_columns import far_columns, partition
from megahybrid_kernels.precision import accumulator
from megahybrid_kernels.sequences import Sequences

_SCORES = 1024  # of a program


@dataclass(frozen=True)
class _Rows:
    """The packed row of cached and new tokens.

    Attributes:
        q: `[rows, query_heads, head_dim]`; k, v: `[rows, kv_heads, head_dim]`.
        score: `[rows, kv_heads]`, 0 where it has not arrived yet.
        worth: rank of each row among candidates, `[rows, kv_heads]`; those that are none have 0 or less.
        positions: int64 `[rows, kv_heads or 1]`, -1 for blanks.
        sequences: the borders.
        begins, ends: int32 `[rows]`, as of `Sequences`, but blank rows of a window are a document of their own.
        new: int64 `[tokens]`, rows of the new tokens; None where there are no others.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    score: Tensor
    worth: Tensor
    positions: Tensor
    sequences: Sequences
    begins: Tensor
    ends: Tensor
    new: Tensor | None


@kernel
def lte_first_scores_kernel(
    late_score, begins, ends, score, worth, count, heads, delay, sinks, BLOCK: tl.constexpr
):  # fmt: skip
    """Score and worth of `_Rows`, all `[rows, heads]` of `count` values, where sequences begin."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    row = place // heads
    begin = tl.load(begins + row, mask=inside, other=0)
    end = tl.load(ends + row, mask=inside, other=0)
    value = tl.load(late_score + place + delay * heads, mask=inside & (row + delay < end), other=0)
    tl.store(score + place, value, mask=inside)
    tl.store(worth + place, tl.where(row - begin < sinks, float("inf"), value), mask=inside)


def _first_rows(
    q: Tensor, k: Tensor, v: Tensor, late_score: Tensor, sequences: Sequences, delay: int, sink_size: int
) -> _Rows:
    """Those of sequences that begin here."""
    late_score = late_score.contiguous()
    score, worth = torch.empty_like(late_score), torch.empty_like(late_score)
    begins, ends, count = sequences.begins, sequences.ends, late_score.numel()
    lte_first_scores_kernel[cdiv(count, _SCORES)](
        late_score, begins, ends, score, worth, count, late_score.shape[1], delay, sink_size, BLOCK=_SCORES
    )
    return _Rows(q, k, v, score, worth, sequences.positions[:, None], sequences, begins, ends, None)


def _later_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    late_score: Tensor,
    cache: LTECache,
    sequences: Sequences,
    delay: int,
    sink_size: int,
) -> _Rows:
    """Those of sequences with a cache, which may be empty."""
    slots, buffer = cache.k.shape[2], cache.buffer_k.shape[2]
    cached = buffer + slots
    rows, new = sequences.behind(cached), sequences.rows_behind(cached)
    starts, first = sequences.starts[:, None], rows.cu_seqlens[:-1, None].long()
    old = first + torch.arange(cached, device=q.device)

    by_position = cache.buffer_positions.argsort(dim=2, stable=True)
    ring = (starts + torch.arange(slots, device=q.device)) % slots

    def laid(buffer_part: Tensor, ring_part: Tensor, new_part: Tensor) -> Tensor:
        parts = torch.cat([gather_slots(buffer_part, by_position), gather_slots(ring_part, ring)], 2).transpose(1, 2)
        x = parts.new_zeros(rows.tokens, *new_part.shape[1:])
        x[old] = parts
        x[new] = new_part.to(x.dtype)
        return x

    ring_positions = cache.positions[:, None].expand(-1, k.shape[1], -1)
    positions = laid(cache.buffer_positions, ring_positions, sequences.positions[:, None].expand(-1, k.shape[1]))
    # What arrives with a new token is the score of `delay` rows before.
    score = laid(cache.buffer_score, cache.score, late_score)
    before_new = rows.offsets < cached
    arrives = (rows.offsets + delay >= cached) & (rows.remaining >= delay)
    score = torch.where(arrives[:, None], score.roll(-delay, 0), score.masked_fill(~before_new[:, None], 0))
    score = score.masked_fill(positions < 0, 0)
    worth = score.masked_fill((positions >= 0) & (positions < sink_size), torch.inf)
    # The window's oldest has left it before the first new token: it is in the buffer or gone.
    worth = worth.masked_fill((rows.offsets == buffer)[:, None], 0)

    blank = (first + cached - starts).clamp(min=0)
    # A window that is not full yet: the buffer is empty, and the sequence begins within the window's rows.
    begin = torch.where(starts < slots, blank, first).to(torch.int32)[rows.index, 0]
    inside = torch.arange(rows.tokens, device=q.device) >= begin
    begins, ends = torch.where(inside, begin, rows.begins), torch.where(inside, rows.ends, begin)
    queries = q.new_zeros(rows.tokens, *q.shape[1:]).index_copy_(0, new, q)
    keys, values = laid(cache.buffer_k, cache.k, k), laid(cache.buffer_v, cache.v, v)
    # A product with 0 shows what blanks hold if it is not finite.
    values = values.masked_fill((positions < 0)[..., None], 0)
    return _Rows(queries, keys, values, score, worth, positions, rows, begins, ends, new)


def lte_attention_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    late_score: Tensor,
    cache: LTECache | None,
    sequences: Sequences,
    window_size: int,
    sink_size: int,
    buffer_size: int,
    delay: int,
) -> tuple[Tensor, LTECache]:
    """`lte_attention_with_cache` for many new tokens, without gradients and without waiting for the GPU.

    It equals the reference but for rounding and the order of the buffer's slots. Arguments are those of
    `lte_attention_with_cache`; where `sequences.starts` is None, `cache` is not read.
    """
    q, k, v = map(dense_rows, (q, k, v))
    late_score = late_score.detach().to(accumulator(k.dtype))
    if sequences.starts is None:
        rows = _first_rows(q, k, v, late_score, sequences, delay, sink_size)
    else:
        rows = _later_rows(q, k, v, late_score, cache, sequences, delay, sink_size)
    packed, worth, exits = rows.sequences, rows.worth, None
    if max(packed.lengths) > buffer_size + window_size:  # so many may have left the window of the query to come
        exits = exit_positions(worth, packed, window_size, 0, buffer_size)
    shape = _Shape.of(rows.q, rows.k, None)
    part = partition(packed, window_size, shape.queries, shape.tune.keys, exits is not None)
    part = replace(part, begins=rows.begins, ends=rows.ends)
    o, _ = _forward(shape, rows.q, rows.k, rows.v, far_columns(worth, exits, packed, part, 0, buffer_size), part)
    positions = rows.positions.expand(-1, k.shape[1])
    after = cache_after(rows.k, rows.v, rows.score, positions, worth, exits, packed, window_size, buffer_size)
    return o if rows.new is None else o[rows.new], after
