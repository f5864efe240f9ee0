"""The joint blocks of a tile of neighbouring tokens, and which of its tokens selected each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.integers import next_power_of_2
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.native_sparse_attention.triton_plan import tiles_of
from megahybrid_kernels.sequences import Sequences


class Union(NamedTuple):
    """Of each tile and KV head; what is beyond a count is unwritten.

    Attributes:
        blocks: int32 `[tiles, kv_heads, tokens of a tile * num_blocks]`, ascending numbers within the document.
        members: int32, likewise; bit p says that the tile's token p selected the block.
        counts: int32 `[tiles, kv_heads]`.
    """

    blocks: Tensor
    members: Tensor
    counts: Tensor


@kernel
def union_kernel(
    selection, blocks, members, counts, firsts, ends, first_tile, first_row, end_row, heads,
    TOKENS: tl.constexpr, NUM_BLOCKS: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile and head: all pairs of its entries are compared, STEP with all others at once.

    selection int32 `[.., heads, NUM_BLOCKS]`, contiguous, holds the tokens from `first_row` to before `end_row`; SLOTS
    is NUM_BLOCKS padded. Of equal entries the one of the earliest token counts; its place is the number of lesser ones
    that count.
    """
    ENTRIES: tl.constexpr = TOKENS * SLOTS
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    i0 = tl.load(firsts + first_tile + tile)
    selection += ((i0 - first_row).to(tl.int64) * heads + head) * NUM_BLOCKS
    tokens = tl.minimum(tl.minimum(tl.load(ends + i0), end_row) - i0, TOKENS)
    absent = first_row - i0
    entry = tl.arange(0, ENTRIES)
    token, slot = entry // SLOTS, entry % SLOTS
    listed = (token >= absent) & (token < tokens) & (slot < NUM_BLOCKS)
    block = tl.load(selection + token.to(tl.int64) * heads * NUM_BLOCKS + slot, mask=listed, other=-1)
    member, place = tl.zeros([ENTRIES], tl.int32), tl.zeros([ENTRIES], tl.int32)
    for e in tl.range(0, ENTRIES, STEP):
        other = e + tl.arange(0, STEP)
        other_token, other_slot = other // SLOTS, other % SLOTS
        there = (other_token >= absent) & (other_token < tokens) & (other_slot < NUM_BLOCKS)
        places = other_token.to(tl.int64) * heads * NUM_BLOCKS + other_slot
        other_block = tl.load(selection + places, mask=there, other=-1)
        equal = block[:, None] == other_block[None, :]
        member += tl.sum(tl.where(equal, (1 << other_token)[None, :], 0), 1)
        earlier = tl.max((equal & (token[:, None] < other_token[None, :])).to(tl.int32), 0)
        counts_here = (other_block >= 0) & (earlier == 0)
        place += tl.sum((counts_here[None, :] & (other_block[None, :] < block[:, None])).to(tl.int32), 1)
    first = (block >= 0) & ((member & ((1 << token) - 1)) == 0)
    out = (tl.program_id(0)).to(tl.int64) * (TOKENS * NUM_BLOCKS) + place
    tl.store(blocks + out, block, mask=first)
    tl.store(members + out, member, mask=first)
    tl.store(counts + tl.program_id(0), tl.sum(first.to(tl.int32), 0))


def union(selection: Tensor, sequences: Sequences, size: int, rows: tuple[int, int] | None = None) -> Union:
    """Of the tiles of `size` tokens that hold the tokens `rows`, all without; selection int32 `[tokens of these,
    kv_heads, num_blocks]`, contiguous."""
    rows = rows or (0, sequences.tokens)
    (tiles, first, count), (_, heads, num_blocks) = tiles_of(sequences, size, rows), selection.shape
    blocks, members = (
        torch.empty(count, heads, size * num_blocks, dtype=torch.int32, device=selection.device) for _ in range(2)
    )
    counts = torch.empty(count, heads, dtype=torch.int32, device=selection.device)
    slots = next_power_of_2(num_blocks)
    entries = size * slots
    union_kernel[count * heads](
        selection, blocks, members, counts, tiles.firsts, sequences.ends, first, *rows, heads,
        TOKENS=size, NUM_BLOCKS=num_blocks, SLOTS=slots, STEP=max(1, min(entries, 4096 // entries)), num_warps=4,
    )  # fmt: skip
    return Union(blocks, members, counts)
