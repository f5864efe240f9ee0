"""The backward pass of native sparse attention: launches of `triton_query_gradient` and `triton_key_gradient`.

Every output is written by one program in a fixed order: no atomics, the same bits every time. Far uses of keys and uses
of means are summed first, a bounded part of them a program, as fp32 rows that the last kernel adds up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megahybrid_kernels.heads import row_strides
from megahybrid_kernels.integers import cdiv, next_power_of_2
from megahybrid_kernels.native_sparse_attention import triton_pairs
from megahybrid_kernels.native_sparse_attention.triton_key_gradient import (
    compressed_gradient_kernel,
    key_gradient_kernel,
    selected_gradient_kernel,
)
from megahybrid_kernels.native_sparse_attention.triton_pairs import PooledItems, far_pairs, pooled_items
from megahybrid_kernels.native_sparse_attention.triton_plan import Saved, Shape
from megahybrid_kernels.native_sparse_attention.triton_query_gradient import prepare_kernel, query_gradient_kernel
from megahybrid_kernels.native_sparse_attention.triton_union import union
from megahybrid_kernels.sequences import Sequences
from megahybrid_kernels.targets import CDNA3, HOPPER, table_of
from megahybrid_kernels.tuning import Launch


@dataclass(frozen=True)
class Tuning:
    """Tiles of the backward kernels.

    Attributes:
        rows: query rows (tokens times padded heads) of a program of dq.
        keys: keys, or means, of a program of the others; of a block at most its tokens.
        query, selected, compressed, key: launches, their size a step of the loop: keys where a program owns queries,
            query rows where it owns keys.
    """

    rows: int
    keys: int
    query: Launch
    selected: Launch
    compressed: Launch
    key: Launch


def tuning(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tuning:
    """Fixed by head dim, dtype and the kind of GPU, so that all ranks and lengths run the same code."""
    if dtype == torch.float32:
        # Without tf32 a product unrolls to single multiplications: larger tiles compile for minutes.
        launch = Launch(16, 4, 1)
        return Tuning(32, 16, launch, launch, launch, launch)
    table = table_of(device)
    if head_dim <= 64:
        # Three programs a multiprocessor where 168 registers hold almost all, else two.
        lean, launch = Launch(64, 4, 3, 168 if table is HOPPER else None), Launch(64, 4, 3)
        tune = Tuning(64, 64, query=lean, selected=launch, compressed=lean, key=launch)
    elif head_dim <= 128:
        launch = Launch(64, 4, 2)
        # Two sums of keys are in registers, as are operands on Ampere; on Blackwell four warps spill at 256 alone.
        more = launch if table is HOPPER else Launch(64, 8, 2)
        tune = Tuning(64, 64, query=launch, selected=more, compressed=launch, key=more)
    else:
        launch = Launch(32, 4, 2)
        tune = Tuning(32, 32, launch, launch, launch, key=launch if table is HOPPER else Launch(32, 8, 2))
    if table is CDNA3:  # what is loaded a step ahead is in registers
        launch = Launch(32, 4, 1)
        return replace(tune, selected=launch, compressed=launch, key=launch)
    return tune


@dataclass(frozen=True)
class _Backward:
    """One call: what its kernels share."""

    shape: Shape
    tune: Tuning
    saved: Saved
    do: Tensor
    sequences: Sequences
    window: int

    @property
    def keys(self) -> int:
        """Keys of a program that owns some."""
        return min(self.tune.keys, self.shape.block_size)

    def queries(self, launch: Launch) -> int:
        """Tokens of a step over query rows."""
        return max(1, launch.size // self.shape.heads)

    def partial_sums(self, *rows: int) -> tuple[Tensor, Tensor]:
        """For dk and dv."""
        size = (*rows, self.shape.head_dim)
        return tuple(torch.empty(*size, dtype=torch.float32, device=self.do.device) for _ in range(2))

    def constants(self) -> dict[str, object]:
        return self.shape.constants(self.do.dtype) | {"BLOCK": self.shape.block_size}

    def prepare(self) -> tuple[Tensor, list[Tensor]]:
        """dgates, and each branch's statistics."""
        saved, shape = self.saved, self.shape
        dgates = torch.empty_like(saved.gates)
        statistics = [
            torch.empty(*saved.lse_window.shape, 2, dtype=torch.float32, device=self.do.device) for _ in range(3)
        ]
        rows, size = shape.tokens * shape.query_heads, 64
        constants = shape.constants(self.do.dtype)
        prepare_kernel[cdiv(rows, size)](
            self.do, saved.o_compressed, saved.o_selected, saved.o_window, saved.lse_compressed, saved.lse_selected,
            saved.lse_window, saved.gates, saved.selection, self.sequences.begins, dgates, *statistics, rows,
            shape.kv_heads, HEAD_DIM=shape.head_dim, WIDTH=constants["WIDTH"], GROUPS=shape.groups,
            BLOCK=shape.block_size, NUM_BLOCKS=shape.num_blocks, SLOTS=next_power_of_2(shape.num_blocks), ROWS=size,
        )  # fmt: skip
        return dgates, statistics

    def query_gradient(self, statistics: list[Tensor]) -> Tensor:
        saved, shape, launch = self.saved, self.shape, self.tune.query
        q, k, v = saved[:3]
        dq = torch.empty_like(self.do)
        tiles = self.sequences.tiles(shape.tile_tokens(self.tune.rows))
        joint = union(saved.selection, self.sequences, tiles.size)
        query_gradient_kernel[tiles.count * shape.kv_heads](
            q, k, v, saved.pooled_k, saved.pooled_v, self.do, dq, *statistics, *joint, tiles.firsts,
            self.sequences.begins, self.sequences.ends, self.sequences.tiles(shape.block_size).before,
            *row_strides(k, v), shape.kv_heads, self.window, shape.log2_scale, shape.softmax_scale,
            **self.constants(), TOKENS=tiles.size, CAPACITY=joint.blocks.shape[2],
            STEP=min(launch.size, shape.block_size), POOLED_STEP=launch.size, **launch.options(),
        )  # fmt: skip
        return dq

    def selected_gradient(self, statistics: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Items before each block, and their partial sums."""
        saved, shape, launch = self.saved, self.shape, self.tune.selected
        q, k, v = saved[:3]
        blocks = self.sequences.tiles(shape.block_size)
        pairs = far_pairs(saved.selection, self.sequences, shape.block_size)
        items = pairs.item_block.shape[1]
        sums = self.partial_sums(shape.kv_heads, items, shape.block_size)
        if items == 0:
            return pairs.item_first, sums
        selected_gradient_kernel[items * (shape.block_size // self.keys) * shape.kv_heads](
            q, k, v, self.do, *sums, statistics, *pairs, blocks.firsts, *row_strides(k, v), blocks.count, items,
            pairs.tokens.shape[1], shape.log2_scale, **self.constants(), ITEM=triton_pairs.ITEM, KEYS=self.keys,
            QUERIES=self.queries(launch), **launch.options(),
        )  # fmt: skip
        return pairs.item_first, sums

    def compressed_gradient(self, statistics: Tensor) -> tuple[PooledItems, tuple[Tensor, Tensor]]:
        """The items, and their partial sums."""
        saved, shape, launch = self.saved, self.shape, self.tune.compressed
        pooled = self.sequences.once(pooled_items, shape.block_size)
        items, sums = pooled.item_tile.shape[0], self.partial_sums(pooled.rows, shape.kv_heads)
        if items == 0:
            return pooled, sums
        compressed_gradient_kernel[items * (triton_pairs.POOLED // self.tune.keys) * shape.kv_heads](
            saved.q, saved.pooled_k, saved.pooled_v, self.do, *sums, statistics, self.sequences.begins,
            self.sequences.ends, self.sequences.tiles(shape.block_size).before, pooled.firsts, pooled.item_tile,
            pooled.item_begin, pooled.item_row, items, shape.log2_scale, **self.constants(), **_parts(),
            KEYS=self.tune.keys, QUERIES=self.queries(launch), **launch.options(),
        )  # fmt: skip
        return pooled, sums

    def key_gradient(self, statistics: list[Tensor]) -> tuple[Tensor, Tensor]:
        saved, shape, launch = self.saved, self.shape, self.tune.key
        q, k, v = saved[:3]
        compressed, selected, window = statistics
        item_first, selected_sums = self.selected_gradient(selected)
        pooled, pooled_sums = self.compressed_gradient(compressed)
        dk, dv = (torch.empty(*k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        blocks = self.sequences.tiles(shape.block_size)
        key_gradient_kernel[blocks.count * (shape.block_size // self.keys) * shape.kv_heads](
            q, k, v, self.do, dk, dv, *selected_sums, *pooled_sums, selected, window, self.sequences.begins,
            self.sequences.ends, blocks.firsts, item_first, pooled.before, pooled.row_first, *row_strides(k, v),
            blocks.count, selected_sums[0].shape[1], self.window, shape.log2_scale, shape.softmax_scale,
            **self.constants(), **_parts(), KEYS=self.keys, POOLED_KEYS=self.tune.keys, QUERIES=self.queries(launch),
            **launch.options(),
        )  # fmt: skip
        return dk, dv


def _parts() -> dict[str, int]:
    """constexpr arguments of what knows `PooledItems`."""
    return {"POOLED": triton_pairs.POOLED, "PART": triton_pairs.PART, "MOST_PARTS": triton_pairs.PARTS}


def gradients(
    shape: Shape, saved: Saved, do: Tensor, sequences: Sequences, window_size: int, tune: Tuning | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dgates, contiguous, in the dtypes of what they are gradients of.

    They are NaN where a gate is negative, or a row of the selection lacks its token's own block or the one before.

    Args:
        do: as q, contiguous.
        tune: tile sizes for benchmarks; fixed by head dim, dtype and GPU when left out.
    """
    tune = tune or tuning(shape.head_dim, do.dtype, do.device)
    # One offset serves q, do and dq.
    saved = saved._replace(q=saved.q.contiguous())
    call = _Backward(shape, tune, saved, do, sequences, min(window_size, shape.tokens))
    dgates, statistics = call.prepare()
    return call.query_gradient(statistics), *call.key_gradient(statistics), dgates
