"""What the forward and the backward kernels of native sparse attention agree on: tiles, sizes and saved tensors.

A tile of queries holds neighbouring tokens of one document and all query heads of one KV head, a row for each pair:
row = token * heads + head, heads rounded up to a power of two (`rows.packed_rows`). Tiles and blocks are cut from each
document's first token on (`Sequences.tiles`), and a tile's tokens divide a block: its queries are all in the same one.

Blocks are numbered within their document in a selection, and over all documents, incomplete ones included, where
something is stored for each: block n of the document of row i is `Sequences.tiles(block_size).before[i] + n`.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megahybrid_kernels.heads import Heads
from megahybrid_kernels.integers import cdiv, next_power_of_2
from megahybrid_kernels.sequences import Sequences, Tiles
from megahybrid_kernels.targets import CDNA3, HOPPER, table_of
from megahybrid_kernels.tuning import Launch

# Tokens of a query tile at most: no block has fewer.
MOST_TOKENS = 16


class Saved(NamedTuple):
    """What the backward pass reads.

    Attributes:
        q: `[tokens, query_heads, head_dim]`; rows and heads of any strides, the last dimension dense.
        k, v: `[tokens, kv_heads, head_dim]`, likewise.
        gates: `[tokens, query_heads, 3]`, contiguous, of the compressed, the selected and the window branch.
        pooled_k, pooled_v: means in k's dtype, `[blocks of all documents, kv_heads, head_dim]`, contiguous. Rows of
            incomplete blocks are left unwritten.
        selection: int32 `[tokens, kv_heads, num_blocks]`, contiguous: ascending numbers within the document, then -1.
        o_compressed, o_selected, o_window: each branch's output before its gate, as q but contiguous.
        lse_compressed, lse_selected, lse_window: fp32 `[tokens, query_heads]`, log2 of the sum over what a row sees of
            `exp2(log2_scale * <q, k>)`, so that probabilities are `exp2(log2_scale * <q, k> - lse)`; +inf where a row
            sees nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    pooled_k: Tensor
    pooled_v: Tensor
    selection: Tensor
    o_compressed: Tensor
    o_selected: Tensor
    o_window: Tensor
    lse_compressed: Tensor
    lse_selected: Tensor
    lse_window: Tensor


@dataclass(frozen=True)
class Tuning:
    """Rows of a program's query tile (tokens times padded heads), and how kernels are launched.

    Attributes:
        score_rows: of `compress` and `score`; their size is pooled keys a step.
        attend_rows: of `attend`, whose step is a block.
        compress, score, attend: launches.
        top: of the running top list; its size is tokens times KV heads of a program.
        columns: scores that the top list takes a step.
    """

    score_rows: int
    attend_rows: int
    compress: Launch
    score: Launch
    attend: Launch
    top: Launch
    columns: int


def tuning(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tuning:
    """Fixed by head dim, dtype and the kind of GPU, so that all ranks and lengths run the same code."""
    if dtype == torch.float32:
        # Without tf32 a product unrolls to single multiplications: larger tiles compile for minutes.
        launch = Launch(16, 4, 1)
        return Tuning(32, 32, launch, launch, launch, Launch(8, 4, 1), 32)
    top, table = Launch(16, 4, 1), table_of(device)
    if head_dim <= 64:
        attend = Launch(64, 4, 3, 168 if table is HOPPER else None)
        return Tuning(128, 64, Launch(64, 4, 3), Launch(64, 4, 3), attend, top, 64)
    # Two sums of wide heads are in registers, as are operands on Ampere; on Blackwell eight warps spill least. AMD's
    # registers are twice as many.
    warps = 4 if table in (HOPPER, CDNA3) else 8
    if head_dim <= 128:
        return Tuning(64, 64, Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, warps, 2), top, 64)
    stages = 1 if table is CDNA3 else 2  # Triton 3.8 loads another step ahead, for which there is no room
    return Tuning(32, 32, Launch(32, 4, 2), Launch(32, 4, 2), Launch(32, warps, stages), top, 64)


@dataclass(frozen=True)
class Shape(Heads):
    """What every launch needs to know of a call."""

    block_size: int
    num_blocks: int
    tune: Tuning

    @classmethod
    def of(cls, q: Tensor, k: Tensor, block_size: int, num_blocks: int, tune: Tuning | None = None) -> Shape:
        """Of a call with q and k."""
        tune = tune or tuning(q.shape[2], q.dtype, q.device)
        return cls(k.shape[0], k.shape[1], q.shape[1] // k.shape[1], q.shape[2], block_size, num_blocks, tune)

    @property
    def heads(self) -> int:
        """Rows of a token in a tile: `groups`, padded."""
        return next_power_of_2(self.groups)

    def tile_tokens(self, rows: int) -> int:
        """Tokens of a tile of about so many rows; at least the 16 rows that a product takes."""
        return min(MOST_TOKENS, max(rows, 16) // self.heads) or 1

    def constants(self, dtype: torch.dtype) -> dict[str, object]:
        return super().constants(dtype) | {"GROUPS": self.groups, "HEADS": self.heads}


def tiles_of(sequences: Sequences, size: int, rows: tuple[int, int]) -> tuple[Tiles, int, int]:
    """Tiles of `size` tokens, and the first and the number of those that hold the tokens `rows`."""

    def tile(row: int) -> int:
        document = bisect_right(sequences.borders, row) - 1
        before = sum(cdiv(length, size) for length in sequences.lengths[:document])
        return before + (row - sequences.borders[document]) // size

    tiles = sequences.tiles(size)
    if rows == (0, sequences.tokens):
        return tiles, 0, tiles.count
    first = tile(rows[0])
    return tiles, first, tile(rows[1] - 1) + 1 - first
