"""When the capped eviction buffer lets go of each token, by counting in parallel.

A candidate's exit is the arrival of the b-th candidate that outranks it, so nothing has to be played token by token:
the candidates of a head, in order of arrival, are counted block by block from the first of the document on, until b of
them outrank. Blocks, and groups of them, are sorted once, so that each needs a binary search in it: for n candidates
n^2 / 8192 searches of 13 steps at most, without a dependency between candidates (65,536 x 16 heads: 1.1e8), and far
fewer for all that are outranked early.

Candidates' scores are positive, so the bits of their fp32 values compare as integers do; sinks take those of infinity.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.exit_positions.reference import NEVER
from megahybrid_kernels.integers import cdiv
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.prefix_sums import BLOCK, exclusive_prefix
from megahybrid_kernels.sequences import Sequences

# Candidates of a program, of a block of those that they are compared with, blocks of a group, and candidates of a piece
# of a block that are compared one by one.
_OWN, _OTHERS, _BLOCKS, _PIECE = 128, 512, 8, 16


@triton.jit
def _candidates(score, positions, tokens, sinks, block, head, heads, BLOCK: tl.constexpr):
    """Of a block of a head: the rows, whether each is a candidate, and its rank among candidates as int32."""
    row = block * BLOCK + tl.arange(0, BLOCK)
    inside = row < tokens
    value = tl.load(score + row.to(tl.int64) * heads + head, mask=inside, other=0).to(tl.float32)
    is_sink = tl.load(positions + row, mask=inside, other=0) < sinks
    key = tl.where(is_sink, float("inf"), value).to(tl.int32, bitcast=True)
    return row, inside & (is_sink | (value > 0)), key


@kernel
def _count_candidates(score, positions, sums, exits, tokens, sinks, BLOCK: tl.constexpr):
    """Sums over blocks for `exclusive_prefix`; the exit of those that are no candidates, 0, is written."""
    blocks = tl.cdiv(tokens, BLOCK)
    block, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    heads = tl.num_programs(0) // blocks
    row, is_candidate, _ = _candidates(score, positions, tokens, sinks, block, head, heads, BLOCK)
    tl.store(sums + head * blocks + block, tl.sum(is_candidate.to(tl.int32), 0))
    zero = tl.zeros([BLOCK], tl.int64)
    tl.store(exits + row.to(tl.int64) * heads + head, zero, mask=(row < tokens) & (is_candidate == 0))


@kernel
def _gather_candidates(score, positions, sums, rank, keys, rows, tokens, width, sinks, BLOCK: tl.constexpr):
    """`[heads, width]`: rows and keys of each head's candidates, in order; rank `[heads, tokens + 1]` counts them."""
    blocks = tl.cdiv(tokens, BLOCK)
    block, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    heads = tl.num_programs(0) // blocks
    row, is_candidate, key = _candidates(score, positions, tokens, sinks, block, head, heads, BLOCK)
    one = is_candidate.to(tl.int32)
    slot = exclusive_prefix(one, sums + head * blocks, block, BLOCK)
    rank += head * (tokens + 1) + row
    tl.store(rank, slot, mask=row < tokens)
    tl.store(rank + 1, slot + one, mask=row == tokens - 1)
    tl.store(keys + head * width + slot, key, mask=is_candidate)
    tl.store(rows + head * width + slot, row, mask=is_candidate)


@triton.jit
def _outranks(other_key, other, key, own, first, end):
    """Whether the candidates `other` outrank `own`: of the same document, a higher score, or an equal one earlier."""
    higher = (other_key > key) | ((other_key == key) & (other < own))
    return higher & (other >= first) & (other < end)


@triton.jit
def _count_above(ordered, block, least, open_, BLOCKS: tl.constexpr, OTHERS: tl.constexpr, BITS: tl.constexpr):
    """How many keys of each of BLOCKS blocks from `block` on, 2^BITS = OTHERS ascending ones a block, exceed `least`.

    least: `[OWN, BLOCKS]`; rows that are not open_ mean nothing. A binary search for each.
    """
    begin = block + tl.arange(0, BLOCKS)[None, :] * OTHERS
    below = tl.zeros_like(least)
    for bit in tl.static_range(1, BITS + 1):
        middle = tl.load(ordered + begin + below + ((OTHERS >> bit) - 1), mask=open_[:, None], other=0)
        below = tl.where(middle <= least, below + (OTHERS >> bit), below)
    last = tl.load(ordered + begin + below, mask=open_[:, None], other=0)
    return OTHERS - below - (last <= least).to(tl.int32)


@triton.jit
def _count_pieces(
    keys, block, key, own, first, end, total, count, limit, OTHERS: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """`count` after each candidate's block of OTHERS from `block` on, compared one by one, and how many of these leave
    it below `limit`. All but keys, total and limit: `[OWN]`."""
    below = tl.zeros_like(count)
    for piece in tl.range(0, OTHERS, PIECE):
        other = (block + piece)[:, None] + tl.arange(0, PIECE)[None, :]
        other_key = tl.load(keys + other, mask=other < total, other=0)
        better = _outranks(other_key, other, key[:, None], own[:, None], first[:, None], end[:, None]).to(tl.int32)
        below += tl.sum((count[:, None] + tl.cumsum(better, 1) < limit).to(tl.int32), 1)
        count += tl.sum(better, 1)
    return count, below


@kernel
def _count_outranking(
    keys, ordered, grouped, rows, rank, positions, begins, ends, exits, tokens, width, sorted_end, window, buffer,
    never, OWN: tl.constexpr, OTHERS: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr, GROUP_BITS: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """keys, rows: `[heads, width]`; ordered, grouped: keys, each block of OTHERS, each group of BLOCKS ascending; from
    sorted_end on they are not read."""
    own_blocks = tl.cdiv(tokens, OWN)
    head, heads = (tl.program_id(0) // own_blocks).to(tl.int64), tl.num_programs(0) // own_blocks
    keys += head * width
    ordered += head * width
    grouped += head * width
    rows += head * width
    rank += head * (tokens + 1)
    total = tl.load(rank + tokens)
    own_first = tl.program_id(0) % own_blocks * OWN
    own = own_first + tl.arange(0, OWN)
    if own_first < total:
        exists = own < total
        row = tl.load(rows + own, mask=exists, other=0)
        key = tl.load(keys + own, mask=exists, other=0)
        # The candidates of the own document.
        first = tl.load(rank + tl.load(begins + row, mask=exists, other=0), mask=exists, other=0)
        end = tl.load(rank + tl.load(ends + row, mask=exists, other=0), mask=exists, other=0)
        overflows = exists & (end - first > buffer)
        block = tl.min(tl.where(overflows, first, total), 0) // OTHERS * OTHERS
        block_end = tl.max(tl.where(overflows, end, 0), 0)
        # Where no border of documents lies, for any of the program's candidates.
        plain_first = tl.max(tl.where(exists, first, 0), 0)
        plain_end = tl.minimum(tl.min(tl.where(exists, end, total), 0), sorted_end)
        own_block = own_first // OTHERS * OTHERS
        # `count` stands still once it would reach the buffer's size: `place` is then the block in which it does.
        count = tl.zeros([OWN], tl.int32)
        place = tl.zeros([OWN], tl.int32)
        open_ = overflows
        while (block < block_end) & (tl.max(open_.to(tl.int32), 0) > 0):
            span = block + BLOCKS * OTHERS
            if (block % (BLOCKS * OTHERS) == 0) & (block >= plain_first) & (span <= plain_end):
                # One document. Of those earlier than a candidate's own block an equal score wins, of later ones not.
                has_own = (own_block >= block) & (own_block < span)
                above = tl.zeros([OWN], tl.int32) + buffer
                if has_own == 0:
                    least = tl.where(block < own_block, key - 1, key)[:, None]
                    above = tl.sum(_count_above(grouped, block, least, open_, 1, BLOCKS * OTHERS, GROUP_BITS), 1)
                if tl.max(tl.where(open_, count + above, 0), 0) < buffer:
                    count = tl.where(open_, count + above, count)
                else:
                    begin = block + tl.arange(0, BLOCKS)[None, :] * OTHERS
                    each = tl.where(begin < own_block, key[:, None] - 1, key[:, None])
                    found = _count_above(ordered, block, each, open_, BLOCKS, OTHERS, BITS)
                    if has_own:
                        mine, _ = _count_pieces(
                            keys, tl.zeros_like(own) + own_block, key, own, first, end, total, tl.zeros_like(own), 0,
                            OTHERS, PIECE,
                        )  # fmt: skip
                        found = tl.where(begin == own_block, mine[:, None], found)
                    running = count[:, None] + tl.cumsum(found, 1)
                    before = running < buffer
                    new_count = tl.maximum(count, tl.max(tl.where(before, running, 0), 1))
                    passed = tl.sum(before.to(tl.int32), 1)
                    place = tl.where(open_, block + passed * OTHERS, place)
                    count = tl.where(open_, new_count, count)
                    open_ = open_ & (passed == BLOCKS)
                block = span
            else:
                new_count, _ = _count_pieces(
                    keys, tl.zeros_like(own) + block, key, own, first, end, total, count, 0, OTHERS, PIECE
                )  # fmt: skip
                stays_open = new_count < buffer
                count = tl.where(open_ & stays_open, new_count, count)
                place = tl.where(open_, block, place)
                open_ = open_ & stays_open
                block += OTHERS
        leaves = overflows & (open_ == 0)
        # Within its last block each counts on, one other after another, up to the b-th.
        _, below = _count_pieces(keys, place, key, own, first, end, total, count, buffer, OTHERS, PIECE)
        last_row = tl.load(rows + place + below, mask=leaves, other=0)
        arrival = tl.load(positions + last_row, mask=leaves, other=0) + window + 1
        exit = tl.where(leaves, arrival, never)
        tl.store(exits + row.to(tl.int64) * heads + head, exit, mask=exists)


def exit_positions(score: Tensor, sequences: Sequences, window_size: int, sink_size: int, buffer_size: int) -> Tensor:
    """See `megahybrid_kernels.exit_positions.exit_positions`."""
    score = score.detach().contiguous()
    tokens, heads = score.shape
    # Whole groups, so that each can be sorted.
    group = _OTHERS * _BLOCKS
    width = cdiv(tokens, group) * group
    exits = torch.empty(tokens, heads, dtype=torch.int64, device=score.device)
    blocks = cdiv(tokens, BLOCK)
    sums, rank, rows, keys = (
        torch.empty(heads, count, dtype=torch.int32, device=score.device)
        for count in (blocks, tokens + 1, width, width)
    )
    places = (score, sequences.positions)
    _count_candidates[blocks * heads](*places, sums, exits, tokens, sink_size, BLOCK=BLOCK)
    _gather_candidates[blocks * heads](*places, sums, rank, keys, rows, tokens, width, sink_size, BLOCK=BLOCK)
    # Only a group within one document is searched. A single group is not, whose sorting would only keep the host busy.
    ordered = grouped = keys
    sorted_end = width if max(sequences.lengths) >= group < width else 0
    if sorted_end:
        # What stands behind a head's candidates is never read.
        ordered, grouped = (keys.view(heads, -1, size).sort(2).values for size in (_OTHERS, group))
    _count_outranking[cdiv(tokens, _OWN) * heads](
        keys, ordered, grouped, rows, rank, sequences.positions, sequences.begins, sequences.ends, exits, tokens,
        width, sorted_end, window_size, buffer_size, NEVER, OWN=_OWN, OTHERS=_OTHERS, BITS=_OTHERS.bit_length() - 1,
        BLOCKS=_BLOCKS, GROUP_BITS=group.bit_length() - 1, PIECE=_PIECE,
    )  # fmt: skip
    return exits
