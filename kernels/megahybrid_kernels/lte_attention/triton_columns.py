"""Which keys each tile of queries sees, as index lists that the attention kernels walk.

Key j is seen by the rows `j <= i < until[j]`: first through the window, then while it is kept. The pairs are parted, in
the same way for every kernel, at the granularity of a query tile that begins at row i0 (a multiple of QUERIES):

- near: keys from `near_begin(i0)` on, a multiple of KEYS at most `i0 - window`, are read as contiguous tiles;
- far: what is visible of the keys before it is read through lists. A key turns from near to far at the query tile that
  begins at `far_begin(j)`; only keys with `far_begin(j) < until[j]`, the far columns, appear in a list.

Without a cap a tile's far columns are a slice of its head's list of all columns. With a cap b at most b of them are
alive, and each tile has a list of its own, cut from that of a chunk of CHUNK rows. So work follows what is visible, and
memory stays linear in the number of tokens: `tokens / QUERIES * b` and `tokens / CHUNK * (b + CHUNK)` indices a head.

The gradients of far columns are summed a chunk at a time: a column owns one row of partial sums for every chunk that it
is far in, and `partial` counts those rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.integers import cdiv
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.prefix_sums import BLOCK, exclusive_prefix
from megahybrid_kernels.sequences import Sequences

CHUNK = 4096


@dataclass(frozen=True)
class Partition:
    """How near and far keys are told apart, and when a key stops being seen.

    Attributes:
        window: keys before itself that a query sees, at most the number of tokens.
        queries: rows of a query tile.
        keys: the near keys of a tile begin at a multiple of this.
        chunk: rows, a multiple of `queries` and `keys`, over which one program sums a far column's gradient.
        begins, ends: int32 `[tokens]`, first row of each token's document and the row after its last.
    """

    window: int
    queries: int
    keys: int
    chunk: int
    begins: Tensor
    ends: Tensor

    @property
    def tokens(self) -> int:
        """Rows in all."""
        return self.begins.shape[0]

    @property
    def tiles(self) -> int:
        """Query tiles."""
        return cdiv(self.tokens, self.queries)

    @property
    def chunks(self) -> int:
        """Chunks of rows."""
        return cdiv(self.tokens, self.chunk)


@dataclass(frozen=True)
class Columns:
    """The lists; every row number counts from the start of the packed row of tokens.

    Attributes:
        until: int32 `[heads, tokens]`, each key is seen from its own row on to the rows before this one.
        rank: int32 `[heads, tokens + 1]`, far columns before each row.
        partial: int32 `[heads, tokens + 1]`, rows of partial sums of the far columns before each row.
        partial_rows: bound of the rows of partial sums of a head.
        all: int32 `[heads, tokens]`, a head's far columns in ascending order.
        lists: int32 `[heads, chunks, capacity]`, far columns of each chunk in ascending order.
        list_counts: int32 `[heads, chunks]`, a head's counts next to each other.
        tile_lists: int32, the array that `tile_first` points into.
        tile_first: int64 `[heads, tiles]`, where each query tile's list begins.
        tile_full, tile_count: int32 `[heads, tiles]`; the first `tile_full` of the tile's `tile_count` columns are seen
            by all of its rows.
    """

    until: Tensor
    rank: Tensor
    partial: Tensor
    partial_rows: int
    all: Tensor
    lists: Tensor
    list_counts: Tensor
    tile_lists: Tensor
    tile_first: Tensor
    tile_full: Tensor
    tile_count: Tensor


@triton.jit
def near_begin(i0, window, KEYS: tl.constexpr):
    """First key of the near ones of the query tile at row i0, whatever its document."""
    return tl.maximum(i0 - window, 0) // KEYS * KEYS


@triton.jit
def far_begin(j, window, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """First row of the first query tile that key j is far for: the inverse of `near_begin`."""
    return (j // KEYS * KEYS + KEYS + window + QUERIES - 1) // QUERIES * QUERIES


@kernel
def _visibility(
    score, exits, positions, ends, until, chunks_far, far_sums, chunk_sums, tokens, window, sinks, chunk,
    CAPPED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`[heads, tokens]` from `[tokens, heads]`: until, and in how many chunks a key is far; sums of both over a block.

    far_sums counts the keys that are far at all.
    """
    blocks = tl.cdiv(tokens, BLOCK)
    heads = tl.num_programs(0) // blocks
    block, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    row = block * BLOCK + tl.arange(0, BLOCK)
    inside = row < tokens
    place = row.to(tl.int64) * heads + head
    position = tl.load(positions + row, mask=inside, other=0)
    end = tl.load(ends + row, mask=inside, other=0)
    leaves = tl.minimum(row + window + 1, end)
    if CAPPED:
        # Exits are positions; a document's rows lie at a constant distance from its positions.
        exit = tl.load(exits + place, mask=inside, other=0)
        held_until = tl.minimum(exit, position + (end - row)) - position + row
        seen_until = tl.maximum(held_until, leaves.to(tl.int64)).to(tl.int32)
    else:
        kept = (tl.load(score + place, mask=inside, other=0) > 0) | (position < sinks)
        seen_until = tl.where(kept, end, leaves)
    first = far_begin(row, window, QUERIES, KEYS)
    is_far = inside & (first < seen_until)
    chunks = tl.where(is_far, (seen_until - 1) // chunk - first // chunk + 1, 0)
    tl.store(until + head * tokens + row, seen_until, mask=inside)
    tl.store(chunks_far + head * tokens + row, chunks, mask=inside)
    tl.store(far_sums + head * blocks + block, tl.sum(is_far.to(tl.int32), 0))
    if CAPPED:
        tl.store(chunk_sums + head * blocks + block, tl.sum(chunks, 0))


@kernel
def _all_columns(
    chunks_far, far_sums, chunk_sums, rank, partial, columns, tokens, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A head's far columns in ascending order, and the prefix sums `rank` and `partial`."""
    blocks = tl.cdiv(tokens, BLOCK)
    block, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    row = block * BLOCK + tl.arange(0, BLOCK)
    inside = row < tokens
    chunks = tl.load(chunks_far + head * tokens + row, mask=inside, other=0)
    far = (chunks > 0).to(tl.int32)
    slot = exclusive_prefix(far, far_sums + head * blocks, block, BLOCK)
    tl.store(columns + head * tokens + slot, row, mask=far > 0)
    # The total stands after the last row.
    last = inside & (row == tokens - 1)
    rank += head * (tokens + 1) + row
    tl.store(rank, slot, mask=inside)
    tl.store(rank + 1, slot + far, mask=last)
    if CAPPED:
        before = exclusive_prefix(chunks, chunk_sums + head * blocks, block, BLOCK)
        partial += head * (tokens + 1) + row
        tl.store(partial, before, mask=inside)
        tl.store(partial + 1, before + chunks, mask=last)


@kernel
def _slices(
    rank, begins, ends, tile_first, tile_full, tile_count, tokens, tiles, window,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each query tile's far columns as a slice of `_all_columns`, when nothing ever leaves."""
    blocks = tl.cdiv(tiles, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    tile = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = tile < tiles
    i0 = tile * QUERIES
    begin = tl.load(begins + i0, mask=inside, other=0)
    end = tl.load(ends + i0, mask=inside, other=0)
    near = tl.maximum(near_begin(i0, window, KEYS), begin)
    first = tl.load(rank + head * (tokens + 1) + begin, mask=inside, other=0)
    count = tl.load(rank + head * (tokens + 1) + near, mask=inside, other=0) - first
    out = head * tiles + tile
    tl.store(tile_first + out, head * tokens + first, mask=inside)
    tl.store(tile_count + out, count, mask=inside)
    # Rows of a following document in the same tile see none of them.
    one_document = end >= tl.minimum(i0 + QUERIES, tokens)
    tl.store(tile_full + out, tl.where(one_document, count, 0), mask=inside)


@kernel
def _chunk_lists(
    columns, rank, until, begins, lists, counts, tokens, window, chunk, capacity,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns that are far for some row of a chunk, in ascending order."""
    chunks = tl.cdiv(tokens, chunk)
    number, head = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    i0 = number * chunk
    i1 = tl.minimum(i0 + chunk, tokens)
    first = tl.load(rank + head * (tokens + 1) + tl.load(begins + i0))
    end = tl.load(rank + head * (tokens + 1) + near_begin(i1, window, KEYS))
    count = 0
    for slot in range(first, end, BLOCK):
        slots = slot + tl.arange(0, BLOCK)
        j = tl.load(columns + head * tokens + slots, mask=slots < end, other=0)
        seen_until = tl.load(until + head * tokens + j, mask=slots < end, other=0)
        wanted = (slots < end) & (seen_until > i0) & (far_begin(j, window, QUERIES, KEYS) < i1)
        place = count + tl.cumsum(wanted.to(tl.int32), 0) - 1
        tl.store(lists + (head * chunks + number) * capacity + place, j, mask=wanted)
        count += tl.sum(wanted.to(tl.int32), 0)
    tl.store(counts + head * chunks + number, count)


@kernel
def _tile_lists(
    lists, counts, until, tile_lists, tile_first, tile_full, tile_count, tokens, window, chunk, chunks, capacity,
    count_stride, tile_capacity, QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns alive for a query tile: first those that all its rows see, then those that leave within it."""
    tiles = tl.cdiv(tokens, QUERIES)
    tile, head = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    i0 = tile * QUERIES
    i1 = tl.minimum(i0 + QUERIES, tokens)
    source = lists + (head * chunks + i0 // chunk) * capacity
    end = tl.load(counts + head * count_stride + i0 // chunk)
    out = head * tiles + tile
    target = tile_lists + out * tile_capacity
    count = 0
    for stays in tl.static_range(1, -1, -1):
        for slot in range(0, end, BLOCK):
            slots = slot + tl.arange(0, BLOCK)
            j = tl.load(source + slots, mask=slots < end, other=0)
            seen_until = tl.load(until + head * tokens + j, mask=slots < end, other=0)
            wanted = (slots < end) & (far_begin(j, window, QUERIES, KEYS) <= i0)
            stay = seen_until >= i1
            wanted = wanted & (stay if stays else (seen_until > i0) & (seen_until < i1))
            place = count + tl.cumsum(wanted.to(tl.int32), 0) - 1
            tl.store(target + place, j, mask=wanted)
            count += tl.sum(wanted.to(tl.int32), 0)
        if stays:
            tl.store(tile_full + out, count)
    tl.store(tile_count + out, count)
    tl.store(tile_first + out, out * tile_capacity)


def partition(sequences: Sequences, window: int, queries: int, keys: int, capped: bool) -> Partition:
    """The partition for tiles of `queries` rows and near keys aligned to `keys`."""
    # Without a cap one chunk holds all rows: else every kept column would own a row of partial sums a chunk.
    granule = max(queries, keys)
    chunk = CHUNK if capped else cdiv(sequences.tokens, granule) * granule
    return Partition(min(window, sequences.tokens), queries, keys, chunk, sequences.begins, sequences.ends)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=like.device)


def far_columns(
    score: Tensor, exits: Tensor | None, sequences: Sequences, part: Partition, sinks: int, buffer: int | None
) -> Columns:
    """The lists for `score` `[tokens, heads]`, and for `exits`, int64 `[tokens, heads]`, when there is a cap."""
    tokens, heads = score.shape
    capped = exits is not None
    blocks = cdiv(tokens, BLOCK)
    until, chunks_far, columns = (_empty(score, heads, tokens) for _ in range(3))
    far_sums = _empty(score, heads, blocks)
    chunk_sums = _empty(score, heads, blocks) if capped else far_sums
    rank = _empty(score, heads, tokens + 1)
    partial = _empty(score, heads, tokens + 1) if capped else rank
    _visibility[blocks * heads](
        score, exits if capped else score, sequences.positions, part.ends, until, chunks_far, far_sums, chunk_sums,
        tokens, part.window, sinks, part.chunk, CAPPED=capped, QUERIES=part.queries, KEYS=part.keys, BLOCK=BLOCK,
    )  # fmt: skip
    _all_columns[blocks * heads](
        chunks_far, far_sums, chunk_sums, rank, partial, columns, tokens, CAPPED=capped, BLOCK=BLOCK
    )
    lists = _alive(columns, rank, until, part, buffer) if capped else _prefixes(columns, rank, part)
    # Each chunk that begins within a column's far rows adds one to what its first needs.
    partial_rows = tokens + part.chunks * buffer if capped else tokens
    return Columns(until, rank, partial, partial_rows, columns, *lists)


def _prefixes(columns: Tensor, rank: Tensor, part: Partition) -> tuple[Tensor, ...]:
    """lists, list_counts, tile_lists, tile_first, tile_full and tile_count of `Columns` when nothing ever leaves."""
    heads, tokens = columns.shape
    first = _empty(columns, heads, part.tiles, dtype=torch.int64)
    full, count = (_empty(columns, heads, part.tiles) for _ in range(2))
    _slices[cdiv(part.tiles, 128) * heads](
        rank, part.begins, part.ends, first, full, count, tokens, part.tiles, part.window,
        QUERIES=part.queries, KEYS=part.keys, BLOCK=128,
    )  # fmt: skip
    return columns[:, None], rank[:, tokens:], columns, first, full, count


def _alive(columns: Tensor, rank: Tensor, until: Tensor, part: Partition, buffer: int) -> tuple[Tensor, ...]:
    """The same where a buffer of `buffer` columns lets go of some."""
    heads, tokens = columns.shape
    sizes = {"QUERIES": part.queries, "KEYS": part.keys, "BLOCK": BLOCK}
    if part.chunks == 1:
        # Each column is far for some row of the only chunk.
        lists, counts = columns[:, None], rank[:, tokens:]
    else:
        # At a chunk's first row the buffer holds at most b columns, and at most a chunk's rows turn far within it.
        lists, counts = _empty(columns, heads, part.chunks, buffer + part.chunk), _empty(columns, heads, part.chunks)
        _chunk_lists[part.chunks * heads](
            columns, rank, until, part.begins, lists, counts, tokens, part.window, part.chunk, lists.shape[2], **sizes
        )
    tile_lists = _empty(columns, heads, part.tiles, buffer)
    first = _empty(columns, heads, part.tiles, dtype=torch.int64)
    full, count = (_empty(columns, heads, part.tiles) for _ in range(2))
    _tile_lists[part.tiles * heads](
        lists, counts, until, tile_lists, first, full, count, tokens, part.window, part.chunk, part.chunks,
        lists.shape[2], counts.stride(0), buffer, **sizes,
    )  # fmt: skip
    return lists, counts, tile_lists, first, full, count
