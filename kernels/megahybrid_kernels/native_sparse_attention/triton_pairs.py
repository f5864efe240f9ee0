"""Who sees a block of keys, in items of bounded work for the kernels that sum its gradient.

A token's own block and the one before are near it; a far pair is a token and another block that it selected. Far pairs
are sorted by block, and a block's list, its tokens ascending, is cut into items of at most ITEM tokens. So the block
that every token selects fills as many programs as its list is long. Means are cut likewise, by part of the document.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.integers import cdiv, next_power_of_2
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.sequences import Sequences, numbered

# Tokens of an item of far pairs.
ITEM = 1024
# Neighbouring means that are summed together; a document's tokens come in at most PARTS parts of a multiple of PART.
POOLED, PART, PARTS = 64, 256, 64


class Pairs(NamedTuple):
    """Far pairs of each KV head. Blocks are numbered over all documents.

    Attributes:
        tokens: int32 `[kv_heads, tokens * num_blocks]`, those of far pairs by block and token, then all others'.
        first: int64 `[kv_heads, blocks + 1]`, where each block's pairs begin in `tokens`.
        item_first: int32 `[kv_heads, blocks + 1]`, items before each block.
        item_block: int32 `[kv_heads, items]`, each item's block; `blocks` beyond the last item.
    """

    tokens: Tensor
    first: Tensor
    item_first: Tensor
    item_block: Tensor


class PooledItems(NamedTuple):
    """Pairs of a tile, at most POOLED neighbouring means of one document, and a part of the document's tokens.

    Attributes:
        rows: of partial sums, one of each mean and part; a tile's are those of its first part, of its second, ...
        row_first: int64 `[tiles + 1]`, rows before each tile's.
        firsts: int32 `[tiles]`, the first token of each tile's first block.
        before: int32 `[tokens]`, tiles of the documents before each token's.
        item_tile: int64 `[items]`; item_begin: int32 `[items]`, each item's tile and the first token of its part.
        item_row: int64 `[items + 1]`, rows before each item's.
    """

    rows: int
    row_first: Tensor
    firsts: Tensor
    before: Tensor
    item_tile: Tensor
    item_begin: Tensor
    item_row: Tensor


@kernel
def pair_keys_kernel(
    selection, keys, begins, blocks_before, tokens, blocks,
    NUM_BLOCKS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """keys `[heads, tokens, NUM_BLOCKS]`: the block of each far pair, else `blocks`; selection `[tokens, heads, …]`."""
    tiles = tl.cdiv(tokens, TOKENS)
    tile, head, heads = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.num_programs(0) // tiles
    token, slot = tile * TOKENS + tl.arange(0, TOKENS), tl.arange(0, SLOTS)
    mask = (token < tokens)[:, None] & (slot < NUM_BLOCKS)[None, :]
    begin = tl.load(begins + token, mask=token < tokens, other=0)
    before = tl.load(blocks_before + token, mask=token < tokens, other=0)
    row = token.to(tl.int64)
    places = ((row * heads + head) * NUM_BLOCKS)[:, None] + slot[None, :]
    n = tl.load(selection + places, mask=mask, other=-1)
    # The last two slots are of near blocks, or of none: of whatever selection, no more pairs are far than have a place.
    far = (slot < NUM_BLOCKS - 2)[None, :] & (n >= 0) & (n < ((token - begin) // BLOCK - 1)[:, None])
    key = tl.where(far, before[:, None] + n, blocks)
    places = ((head.to(tl.int64) * tokens + row) * NUM_BLOCKS)[:, None] + slot[None, :]
    tl.store(keys + places, key.to(keys.dtype.element_ty), mask=mask)


def far_pairs(selection: Tensor, sequences: Sequences, block_size: int) -> Pairs:
    """Of a selection int32 `[tokens, kv_heads, num_blocks]`, contiguous."""
    (tokens, heads, num_blocks), blocks = selection.shape, sequences.tiles(block_size)
    dtype = torch.int16 if blocks.count < 2**15 else torch.int32
    keys = torch.empty(heads, tokens * num_blocks, dtype=dtype, device=selection.device)
    pair_keys_kernel[cdiv(tokens, 64) * heads](
        selection, keys, sequences.begins, blocks.before, tokens, blocks.count,
        NUM_BLOCKS=num_blocks, SLOTS=next_power_of_2(num_blocks), BLOCK=block_size, TOKENS=64,
    )  # fmt: skip
    keys, places = keys.sort(dim=1, stable=True)
    borders, items = sequences.once(_borders_and_items, block_size, num_blocks, heads, dtype)
    first = torch.searchsorted(keys, borders)
    ends = ((first.diff(dim=1) + ITEM - 1) // ITEM).cumsum(1, dtype=torch.int32)
    item_first = F.pad(ends, (1, 0))
    item_block = torch.searchsorted(ends, items, right=True, out_int32=True)
    return Pairs((places // num_blocks).to(torch.int32), first, item_first, item_block)


def _borders_and_items(
    sequences: Sequences, block_size: int, num_blocks: int, heads: int, dtype: torch.dtype
) -> list[Tensor]:
    """For each head the numbers of all blocks and the one after them, of that dtype, and of all items, int32."""
    counts = (
        (sequences.tiles(block_size).count + 1, dtype),
        (_far_items(sequences, block_size, num_blocks), torch.int32),
    )
    return [
        torch.arange(n, dtype=kind, device=sequences.cu_seqlens.device).expand(heads, -1).contiguous()
        for n, kind in counts
    ]


def _far_items(sequences: Sequences, block_size: int, num_blocks: int) -> int:
    """Items at most: a document's last two blocks have no far pairs, each other's last item may be short, and two of a
    token's blocks are near it."""
    items = pairs = 0
    for length, n in Counter(sequences.lengths).items():
        items += n * max(0, cdiv(length, block_size) - 2)
        pairs += n * max(0, length - 2 * block_size) * (num_blocks - 2)
    return items + pairs // ITEM


def _part(length):
    """Tokens of a part of a document of so many: a number, or a tensor of them."""
    return (length + PART * PARTS - 1) // (PART * PARTS) * PART


def pooled_items(sequences: Sequences, block_size: int) -> PooledItems:
    """The items of all documents; those that have no complete block have none."""
    borders = sequences.cu_seqlens.to(torch.int32)
    means = borders.diff() // block_size
    tiles = items = rows = 0
    for length, n in Counter(sequences.lengths).items():
        parts, each = cdiv(length, _part(length)), cdiv(length // block_size, POOLED)
        tiles, items, rows = tiles + n * each, items + n * each * parts, rows + n * (length // block_size) * parts
    document, tile, before = numbered((means + POOLED - 1) // POOLED, tiles)
    begins, ends = borders[document], borders[document + 1]
    part = _part(ends - begins)
    parts = (ends - begins + part - 1) // part
    each = (means[document] - tile * POOLED).clamp(max=POOLED)
    row_first = F.pad((parts * each).cumsum(0), (1, 0))
    item_tile, item, _ = numbered(parts, items)
    return PooledItems(
        rows=rows,
        row_first=row_first,
        firsts=begins + tile * POOLED * block_size,
        before=before[sequences.index],
        item_tile=item_tile,
        item_begin=begins[item_tile] + item * part[item_tile],
        item_row=F.pad(each[item_tile].cumsum(0), (1, 0)),
    )
