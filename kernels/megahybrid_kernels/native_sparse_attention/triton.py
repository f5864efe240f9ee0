"""Native sparse attention in Triton: launches and the autograd function.

The forward pass pools keys and values, attends to the means (`triton_score`), chooses blocks by the same logits, joins
the selections of a tile's tokens (`triton_union`) and attends to the joint blocks and the window (`triton_attend`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.native_sparse_attention.triton_attend import attend
from megahybrid_kernels.native_sparse_attention.triton_backward import gradients
from megahybrid_kernels.native_sparse_attention.triton_plan import Saved, Shape, Tuning
from megahybrid_kernels.native_sparse_attention.triton_pool import pool
from megahybrid_kernels.native_sparse_attention.triton_score import compress, needs_scores, select
from megahybrid_kernels.native_sparse_attention.triton_union import union
from megahybrid_kernels.sequences import Sequences


def _forward(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, sequences: Sequences, window_size: int,
    selection: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Saved | None]:  # fmt: skip
    """o, the selection, and if `save` what the backward pass reads."""
    pooled = [pool(x, sequences, shape.block_size) for x in (k, v)]
    return attend_rows(shape, q, k, v, gates, *pooled, sequences, window_size, selection, save, (0, shape.tokens))


def attend_rows(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, pooled_k: Tensor, pooled_v: Tensor,
    sequences: Sequences, window_size: int, selection: Tensor | None, save: bool, rows: tuple[int, int],
) -> tuple[Tensor, Tensor, Saved | None]:  # fmt: skip
    """As `_forward`, of the tokens `rows`, whose q, gates and selection there are, given the means."""
    o_compressed, lse_compressed = compress(shape, q, pooled_k, pooled_v, sequences, rows)
    if selection is None:
        selection = select(shape, q, pooled_k, lse_compressed, sequences, rows)
    gates, selection = gates.contiguous(), selection.contiguous()
    joint = union(selection, sequences, shape.tile_tokens(shape.tune.attend_rows), rows)
    o, rest = attend(shape, q, k, v, gates, joint, o_compressed, sequences, window_size, save, rows)
    if not save:
        return o, selection, None
    o_selected, o_window, *lse = rest
    outputs = (o_compressed, o_selected, o_window, lse_compressed, *lse)
    return o, selection, Saved(q, k, v, gates, pooled_k, pooled_v, selection, *outputs)


class _NativeSparseAttention(torch.autograd.Function):
    """The selection that it returns, or was given, is constant: recomputation given the first one cannot flip it."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, sequences: Sequences, window_size: int,
        selection: Tensor | None, shape: Shape,
    ):  # fmt: skip
        o, selection, saved = _forward(shape, q, k, v, gates, sequences, window_size, selection, True)
        ctx.save_for_backward(*saved)
        ctx.shape, ctx.sequences, ctx.window_size = shape, sequences, window_size
        ctx.mark_non_differentiable(selection)
        return o, selection

    @staticmethod
    def backward(ctx, do: Tensor, _):
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

    tune: tile sizes for benchmarks; fixed by head dim, dtype and GPU when left out.
    """
    q, k, v = map(dense_rows, (q, k, v))
    shape = Shape.of(q, k, block_size, num_blocks, tune)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, gates)):
        return _NativeSparseAttention.apply(q, k, v, gates, sequences, window_size, selection, shape)
    return _forward(shape, q, k, v, gates, sequences, window_size, selection, False)[:2]


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    sequences: Sequences,
    block_size: int,
    num_blocks: int,
    rows: tuple[int, int],
    *,
    tune: Tuning | None = None,
) -> Tensor:
    """See `megahybrid_kernels.native_sparse_attention.select_blocks`; likewise."""
    q, k = map(dense_rows, (q, k))
    shape = Shape.of(q, k, block_size, num_blocks, tune)
    pooled = pool(k, sequences, block_size) if needs_scores(shape, sequences) else None
    return select_rows(shape, q, pooled, sequences, rows)


def select_rows(
    shape: Shape, q: Tensor, pooled_k: Tensor | None, sequences: Sequences, rows: tuple[int, int]
) -> Tensor:
    """The selection of the tokens `rows`, which q holds, given the means of k, which matter if `needs_scores`."""
    lse = None
    if needs_scores(shape, sequences):
        _, lse = compress(shape, q, pooled_k, None, sequences, rows)
    return select(shape, q, pooled_k, lse, sequences, rows)
