"""Native sparse attention in Triton: launches and the autograd function.

The forward pass pools keys and values, attends to the means (`triton_score`), chooses blocks by the same logits, joins
the selections of a tile's tokens (`triton_union`) and attends to the joint blocks and the window (`triton_attend`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.native_sparse_attention.triton_plan import Saved, Shape, Tuning
from megahybrid_kernels.sequences import Sequences


def _forward(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, sequences: Sequences, window_size: int,
    selection: Tensor | None,
) -> tuple[Tensor, Saved]:  # fmt: skip
    raise NotImplementedError


class _NativeSparseAttention(torch.autograd.Function):
    """The selection that it returns, or was given, is constant: recomputation given the first one cannot flip it."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, sequences: Sequences, window_size: int,
        selection: Tensor | None, shape: Shape,
    ):  # fmt: skip
        o, saved = _forward(shape, q, k, v, gates, sequences, window_size, selection)
        ctx.save_for_backward(*saved)
        ctx.shape, ctx.sequences, ctx.window_size = shape, sequences, window_size
        ctx.mark_non_differentiable(saved.selection)
        return o, saved.selection

    @staticmethod
    def backward(ctx, do: Tensor, _):
        from megahybrid_kernels.native_sparse_attention.triton_backward import gradients

        saved = Saved(*ctx.saved_tensors)
        return *gradients(ctx.shape, saved, do.contiguous(), ctx.sequences, ctx.window_size), None, None, None, None


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
    *,
    tune: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """See `megahybrid_kernels.native_sparse_attention.native_sparse_attention`; float32, bfloat16 or float16.

    tune: tile sizes for benchmarks; fixed by head dim and dtype when left out.
    """
    q, k, v = map(dense_rows, (q, k, v))
    shape = Shape.of(q, k, block_size, num_blocks, tune)
    return _NativeSparseAttention.apply(q, k, v, gates, sequences, window_size, selection, shape)
