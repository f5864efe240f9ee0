"""The joint blocks of a tile of neighbouring tokens, and which of its tokens selected each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
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


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b)


@kernel
def union_kernel(
    selection, blocks, members, counts, firsts, ends, first_tile, first_row, end_row, heads,
    TOKENS: tl.constexpr, NUM_BLOCKS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One tile and head: its entries are sorted by block, then by token.

    selection int32 `[.., heads, NUM_BLOCKS]`, contiguous, holds the tokens from `first_row` to before `end_row`; SLOTS
    is NUM_BLOCKS padded.
    """
    ENTRIES: tl.constexpr = TOKENS * SLOTS
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    i0 = tl.load(firsts + first_tile + tile)
    selection += ((i0 - first_row).to(tl.int64) * heads + head) * NUM_BLOCKS
    tokens = tl.minimum(tl.minimum(tl.load(ends + i0), end_row) - i0, TOKENS)
    entry = tl.arange(0, ENTRIES)
    token, slot = entry // SLOTS, entry % SLOTS
    listed = (token >= first_row - i0) & (token < tokens) & (slot < NUM_BLOCKS)
    block = tl.load(selection + token.to(tl.int64) * heads * NUM_BLOCKS + slot, mask=listed, other=-1)
    # A tile's tokens divide a block, so that this has no more bits than a row's number.
    key = tl.sort(tl.where(block >= 0, block * TOKENS + token, 0x7FFFFFFF))
    block, token = key // TOKENS, key % TOKENS
    valid = key != 0x7FFFFFFF
    first = (entry == 0) | (block != tl.gather(block, tl.maximum(entry - 1, 0), 0))
    last = (entry == ENTRIES - 1) | (block != tl.gather(block, tl.minimum(entry + 1, ENTRIES - 1), 0))
    # Bits that no other token of the block has add up to its members: the sum so far, less that before its first entry.
    bit = tl.where(valid, 1 << token, 0)
    total = tl.cumsum(bit, 0)
    member = total - tl.associative_scan(tl.where(first, total - bit, 0), 0, _greater)
    place = tl.program_id(0).to(tl.int64) * (TOKENS * NUM_BLOCKS) + tl.cumsum(first.to(tl.int32), 0) - 1
    tl.store(blocks + place, block, mask=last & valid)
    tl.store(members + place, member, mask=last & valid)
    tl.store(counts + tl.program_id(0), tl.sum((last & valid).to(tl.int32), 0))


def union(selection: Tensor, sequences: Sequences, size: int, rows: tuple[int, int] | None = None) -> Union:
    """Of the tiles of `size` tokens that hold the tokens `rows`, all without; selection int32 `[tokens of these,
    kv_heads, num_blocks]`, contiguous."""
    rows = rows or (0, sequences.tokens)
    (tiles, first, count), (_, heads, num_blocks) = tiles_of(sequences, size, rows), selection.shape
    blocks, members = (
        torch.empty(count, heads, size * num_blocks, dtype=torch.int32, device=selection.device) for _ in range(2)
    )
    counts = torch.empty(count, heads, dtype=torch.int32, device=selection.device)
    union_kernel[count * heads](
        selection, blocks, members, counts, tiles.firsts, sequences.ends, first, *rows, heads,
        TOKENS=size, NUM_BLOCKS=num_blocks, SLOTS=next_power_of_2(num_blocks), num_warps=1,
    )  # fmt: skip
    return Union(blocks, members, counts)
