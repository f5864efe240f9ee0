"""Means of the keys and values of complete blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.integers import tile_width
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.rows import load_all_rows
from megahybrid_kernels.sequences import Sequences


@triton.jit
def mean_of_rows(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """fp32 `[WIDTH]` of `[ROWS, WIDTH]`, ROWS = 2 ** STEPS, summed as `pooling.pool` does: halves onto each other.

    So the bits depend on no layout, and decoding finds those of training.
    """
    total = x.to(tl.float32)
    for step in tl.static_range(STEPS):
        total = tl.sum(tl.reshape(total, [2, ROWS >> (step + 1), WIDTH]), 0)
    return tl.reshape(total, [WIDTH]) * (1.0 / ROWS)


@kernel
def pool_kernel(
    x, pooled, firsts, ends, stride, head_stride, heads,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One head of one block. x `[tokens, heads, HEAD_DIM]`; pooled `[blocks, heads, HEAD_DIM]`, contiguous."""
    block, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    first = tl.load(firsts + block)
    if first + BLOCK <= tl.load(ends + first):
        rows = load_all_rows(x + head * head_stride, first + tl.arange(0, BLOCK), stride, HEAD_DIM, WIDTH)
        column = tl.arange(0, WIDTH)
        mean = mean_of_rows(rows, BLOCK, WIDTH, STEPS).to(pooled.dtype.element_ty)
        tl.store(pooled + (block.to(tl.int64) * heads + head) * HEAD_DIM + column, mean, mask=column < HEAD_DIM)


def pool(x: Tensor, sequences: Sequences, block_size: int) -> Tensor:
    """x `[tokens, heads, head_dim]` -> `[blocks of all documents, heads, head_dim]`, incomplete blocks unwritten."""
    blocks, (_, heads, head_dim) = sequences.tiles(block_size), x.shape
    pooled = torch.empty(blocks.count, heads, head_dim, dtype=x.dtype, device=x.device)
    pool_kernel[blocks.count * heads](
        x, pooled, blocks.firsts, sequences.ends, *x.stride()[:2], heads,
        HEAD_DIM=head_dim, WIDTH=tile_width(head_dim), BLOCK=block_size, STEPS=block_size.bit_length() - 1,
        num_warps=1,
    )  # fmt: skip
    return pooled
